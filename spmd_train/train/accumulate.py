"""Gradients of a batch, microbatch by microbatch, communicated once."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spmd_train.parallel.rules import Layout
from spmd_train.tasks import Batch, LossOutput
from spmd_train.train.state import Params


def sum_gradients(
    loss: Callable[[Params, Batch], LossOutput],
    params: Params,
    batch: Batch,
    *,
    num_microbatches: int,
    layout: Layout,
) -> tuple[Params, LossOutput]:
    """The gradient of `loss_sum / weight_sum` over the whole batch, and the sums themselves.

    Sums are accumulated and divided once, so that the result does not depend on the number of
    microbatches, however ragged they are. With more than one, the axes that only copy the model
    (`replica`, `data`) are taken in hand (`shard_map`): each accumulates its own gradients and they
    are all-reduced once, after the last microbatch.

    Args:
        loss: sums of a microbatch.
        params: parameters.
        batch: the global batch; every array has its examples along the first dim.
        num_microbatches: how many parts it is split into.
        layout: the mesh and its rules.

    Returns:
        Gradients in float32, sharded like the parameters, and the sums of the batch.
    """
    scale = loss_scale(batch)

    def scaled(params: Params, microbatch: Batch) -> tuple[jax.Array, LossOutput]:
        sums = loss(params, microbatch)
        return sums.loss_sum * scale, sums

    gradient = jax.grad(scaled, has_aux=True)

    def accumulate(params: Params, batch: Batch) -> tuple[Params, LossOutput]:
        parts = _microbatches(batch, num_microbatches)

        def add(total: tuple[Params, LossOutput], part: Batch):
            grads, sums = gradient(params, part)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, (grads, sums)), None

        shapes = jax.eval_shape(gradient, params, {name: x[0] for name, x in parts.items()})
        zeros = jax.tree.map(lambda p, s: jnp.zeros_like(p, jnp.float32), params, shapes[0])
        first = next(iter(parts.values()))
        nothing = jnp.sum(first[:0].astype(jnp.float32))
        start = zeros, jax.tree.map(lambda s: jnp.broadcast_to(nothing, s.shape), shapes[1])
        return jax.lax.scan(add, start, parts)[0]

    if num_microbatches == 1:
        grads, sums = gradient(params, batch)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    else:
        copies = tuple(a for a in layout.axes("batch") if a in ("replica", "data"))

        def on_each_copy(params: Params, batch: Batch) -> tuple[Params, LossOutput]:
            # Marked as varying, a gradient is not summed over the copies until we say so.
            params = jax.tree.map(lambda p: jax.lax.pcast(p, copies, to="varying"), params)
            return jax.lax.psum(accumulate(params, batch), copies)

        if copies:
            grads, sums = jax.shard_map(
                on_each_copy,
                mesh=layout.mesh,
                in_specs=(P(), P(copies)),
                out_specs=P(),
                axis_names=set(copies),
            )(params, batch)
        else:
            grads, sums = accumulate(params, batch)
    return per_weight(grads, sums, scale=scale), sums


def sum_losses(
    loss: Callable[[Batch], LossOutput], batch: Batch, *, num_microbatches: int
) -> LossOutput:
    """The sums of a batch, microbatch by microbatch, without gradients."""
    if num_microbatches == 1:
        return loss(batch)
    parts = _microbatches(batch, num_microbatches)

    def add(total: LossOutput, part: Batch) -> tuple[LossOutput, None]:
        return jax.tree.map(jnp.add, total, loss(part)), None

    shapes = jax.eval_shape(loss, {name: x[0] for name, x in parts.items()})
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, parts)[0]


def _microbatches(batch: Batch, count: int) -> Batch:
    """Each with `count` as its first dim: microbatch i is every n-th example from i on.

    So each device keeps the rows it has.
    """
    return {
        name: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0) for name, x in batch.items()
    }


def loss_scale(batch: Batch) -> float:
    """What the loss is multiplied by; `per_weight` cancels it.

    A constant near 1 / the sum of weights keeps low-precision gradients in range.
    """
    return 1.0 / math.prod(next(iter(batch.values())).shape)


def per_weight(grads: Params, sums: LossOutput, *, scale: float) -> Params:
    """Gradients of `loss_sum / weight_sum` from those of `loss_sum * scale`."""
    factor = 1.0 / (scale * jnp.maximum(sums.weight_sum, 1.0))
    return jax.tree.map(lambda g: g * factor, grads)
