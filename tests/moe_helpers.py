"""A mixture of experts written as a loop over tokens and experts, in NumPy and float64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from spmd_train.config import MoEConfig


@dataclasses.dataclass
class Reference:
    """What the loop found.

    Attributes:
        out: [B, T, D].
        balance: [B].
        z_squared: [B].
        load: [B, E].
        dropped: [B].
    """

    out: np.ndarray
    balance: np.ndarray
    z_squared: np.ndarray
    load: np.ndarray
    dropped: np.ndarray


def reference(
    params: dict[str, Any], x: np.ndarray, is_token: np.ndarray, config: MoEConfig, bias=0.0
) -> Reference:
    """Runs every token of `x` [B, T, D] through its experts, one after another."""
    num_rows, length, _ = x.shape
    num_experts, k = config.num_experts, config.top_k
    capacity = math.inf
    if config.dispatch == "capacity":
        capacity = math.ceil(config.capacity_factor * length * k / num_experts)
    experts = {n: p["kernel"] for n, p in params["experts"].items()}
    result = Reference(
        np.zeros(x.shape),
        np.zeros(num_rows),
        np.zeros(num_rows),
        np.zeros((num_rows, num_experts)),
        np.zeros(num_rows),
    )
    for b in range(num_rows):
        probabilities, log_z = [], []
        taken = np.zeros(num_experts)
        for t in range(length):
            if "shared" in params:
                shared = {n: p["kernel"] for n, p in params["shared"].items()}
                result.out[b, t] += mlp(x[b, t], **shared)
            if not is_token[b, t]:
                continue
            logits = x[b, t] @ params["router"]["kernel"]
            exponents = np.exp(logits - logits.max())
            log_z.append(np.log(exponents.sum()) + logits.max())
            softmax = config.scores == "softmax"
            scores = exponents / exponents.sum() if softmax else 1 / (1 + np.exp(-logits))
            probabilities.append(scores / scores.sum())
            chosen = np.argsort(-(scores + bias), kind="stable")[:k]
            total = scores[chosen].sum() if config.renormalize else 1.0
            for e in chosen:
                result.load[b, e] += 1
                if taken[e] >= capacity:
                    result.dropped[b] += 1
                    continue
                taken[e] += 1
                weight = scores[e] / total * config.routed_scale
                result.out[b, t] += weight * mlp(x[b, t], **{n: w[e] for n, w in experts.items()})
        if probabilities:
            share = result.load[b] / (len(probabilities) * k)
            result.balance[b] = num_experts * share @ np.mean(probabilities, axis=0)
            result.z_squared[b] = np.mean(np.square(log_z))
    return result


def mlp(x: np.ndarray, *, up: np.ndarray, down: np.ndarray, gate: np.ndarray | None = None):
    """SwiGLU, or GELU in the tanh form."""
    hidden = x @ up
    if gate is not None:
        gated = x @ gate
        hidden = gated / (1 + np.exp(-gated)) * hidden
    else:
        cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
        hidden = 0.5 * hidden * (1 + np.tanh(cubic))
    return hidden @ down
