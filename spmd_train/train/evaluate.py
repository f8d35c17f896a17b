"""Evaluation over a whole split, exactly: weighted sums, added on the device, read once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from spmd_train.tasks import Batch
from spmd_train.train.program import Metrics, Program
from spmd_train.train.state import Params


def means(metrics: Metrics | dict[str, float]) -> dict[str, float]:
    """Means over tokens of a tree of sums; the loss in nats per token.

    Args:
        metrics: `weight_sum`, `loss_sum` and other sums; scalars that are no sums
            (`grad_norm`, `learning_rate`, `skipped`) pass unchanged. `expert_load` and
            `expert_dropped` become what `load_metrics` says.

    Returns:
        `loss` and the rest, as Python floats. NaN where nothing was weighed.
    """
    load = metrics.get("expert_load")
    values = {name: float(v) for name, v in metrics.items() if name != "expert_load"}
    dropped = values.pop("expert_dropped", 0.0)
    weight = values.pop("weight_sum")
    plain = {n: values.pop(n) for n in ("grad_norm", "learning_rate", "skipped") if n in values}
    values["loss"] = values.pop("loss_sum")
    of_experts = {} if load is None else load_metrics(np.asarray(load), dropped=dropped)
    return {n: v / weight if weight else math.nan for n, v in values.items()} | of_experts | plain


def load_metrics(load_LE: np.ndarray, *, dropped: float) -> dict[str, float]:
    """How even the load of experts was.

    Args:
        load_LE: how many tokens chose each expert of each layer.
        dropped: how many choices of all layers found their expert full.

    Returns:
        `expert_load_max` and `expert_load_min`, over the even share, of the layers where they are
        worst; `expert_load_entropy`, over that of an even load, mean of the layers;
        `expert_drop_rate`, of all choices. NaN where there was no token.
    """
    load_LE = load_LE.astype(np.float64)
    total = load_LE.sum()
    if not total:
        names = ("expert_load_max", "expert_load_min", "expert_load_entropy", "expert_drop_rate")
        return dict.fromkeys(names, math.nan)
    share_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    log_LE = np.log(np.where(share_LE > 0, share_LE, 1))
    num_experts = load_LE.shape[1]
    return {
        "expert_load_max": float(share_LE.max() * num_experts),
        "expert_load_min": float(share_LE.min() * num_experts),
        "expert_load_entropy": float(-(share_LE * log_LE).sum(1).mean())
        / (math.log(num_experts) or 1.0),
        "expert_drop_rate": dropped / float(total),
    }


def with_bits_per_byte(values: dict[str, float], *, bytes_per_token: float) -> dict[str, float]:
    """Adds `bits_per_byte`: cross-entropy in bits over the bytes of text a token stands for."""
    bits = values["cross_entropy"] / math.log(2)
    return values | {"bits_per_byte": bits / bytes_per_token}


class StoppedError(Exception):
    """Told to stop before the last batch."""


def evaluate(
    program: Program,
    params: Params,
    batches: Iterable[Batch],
    *,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Evaluates parameters on batches.

    Args:
        program: whose `eval_step` to run.
        params: sharded as the program plans.
        batches: global batches; padding has weight 0.
        stop: asked after every batch whether to leave.

    Returns:
        Means over all tokens of all batches.

    Raises:
        StoppedError: told to stop.
        ValueError: there is no batch.
    """
    total: Metrics | None = None
    for batch in batches:
        sums, before = program.eval_step(params, batch), total
        total = sums if total is None else {name: total[name] + sums[name] for name in total}
        jax.block_until_ready(before)  # One batch ahead of the device, so that it can stop.
        if stop():
            raise StoppedError
    if total is None:
        raise ValueError("evaluate: the evaluation split has no batch")
    return means(jax.device_get(total))
