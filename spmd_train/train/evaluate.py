"""Evaluation over a whole split, exactly: weighted sums, added on the device, read once."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax

from spmd_train.tasks import Batch
from spmd_train.train.program import Metrics, Program
from spmd_train.train.state import Params


def means(metrics: Metrics | dict[str, float]) -> dict[str, float]:
    """Means over tokens of a tree of sums; the loss in nats per token.

    Args:
        metrics: `weight_sum`, `loss_sum` and other sums; scalars that are no sums
            (`grad_norm`, `learning_rate`, `skipped`) pass unchanged.

    Returns:
        `loss` and the rest, as Python floats. NaN where nothing was weighed.
    """
    values = {name: float(v) for name, v in metrics.items()}
    weight = values.pop("weight_sum")
    plain = {n: values.pop(n) for n in ("grad_norm", "learning_rate", "skipped") if n in values}
    values["loss"] = values.pop("loss_sum")
    return {n: v / weight if weight else math.nan for n, v in values.items()} | plain


def with_bits_per_byte(values: dict[str, float], *, bytes_per_token: float) -> dict[str, float]:
    """Adds `bits_per_byte`: cross-entropy in bits over the bytes of text a token stands for."""
    bits = values["cross_entropy"] / math.log(2)
    return values | {"bits_per_byte": bits / bytes_per_token}


def evaluate(program: Program, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """Evaluates parameters on batches.

    Args:
        program: whose `eval_step` to run.
        params: sharded as the program plans.
        batches: global batches; padding has weight 0.

    Returns:
        Means over all tokens of all batches.

    Raises:
        ValueError: there is no batch.
    """
    total: Metrics | None = None
    for batch in batches:
        sums = program.eval_step(params, batch)
        total = sums if total is None else {name: total[name] + sums[name] for name in total}
    if total is None:
        raise ValueError("evaluate: the evaluation split has no batch")
    return means(jax.device_get(total))
