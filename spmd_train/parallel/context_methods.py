"""What each method of `context.method` does on a device's shards: its sends, forward, backward.

Dims: B batch, T a device's queries, S keys, H query heads, G key heads, R = H / G, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from spmd_train.parallel.blockwise import (
    Attending,
    Gradients,
    Keys,
    Result,
    Tokens,
    output_dot,
    zero_gradients,
)
from spmd_train.parallel.placement import Placement, RingStep, Tiles
from spmd_train.parallel.rules import to_spec

Arrays = tuple[jax.Array, ...]
"""Arrays that belong to queries, keys and values."""


@dataclasses.dataclass(frozen=True)
class Split:
    """What is the same on every device.

    Attributes:
        axes: mesh axes of the sequence.
        placement: where its tokens are.
        by: computes a step.
        kv_copies: ulysses: each key head is sent so often. With fewer key heads than devices, so
            each device has the one that its query heads look at.
        by_groups: the ring sends by all-gathers. XLA's CPU runtime lets every device of the mesh
            wait for a permutation, also those whose pipeline stage is idle and takes no part; an
            all-gather is its group's alone.
    """

    axes: tuple[str, ...]
    placement: Placement
    by: Attending
    kv_copies: int
    by_groups: bool

    def send(self, tree: Any, *, distance: int) -> Any:
        """Gives each device what the one `distance` before it in the ring has; 0: its own."""
        if not distance:
            return tree
        c = self.placement.num_devices
        if self.by_groups:
            source = (jax.lax.axis_index(self.axes) - distance) % c
            return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes)[source], tree)
        return jax.lax.ppermute(tree, self.axes, [(i, (i + distance) % c) for i in range(c)])

    def go_round(self, step: Callable[..., Any], carry: Any) -> Any:
        """Runs `step(carry, walk, ring_step)` for each step of the ring; alike ones in a loop.

        A loop also bounds what is in flight: transfers do not wait for compute, and side by side
        they would bring the keys of all devices here at once.
        """
        for ring in self.placement.grouped_ring():
            walk = self.by.walk(ring.tiles, self.axes)
            if len(ring.tiles) == 1:
                carry = step(carry, _only(walk), ring)
            else:
                carry = jax.lax.scan(
                    lambda carry, one, r=ring: (step(carry, one, r), None), carry, walk
                )[0]
        return carry

    def gather(self, tree: Any) -> Any:
        """All tokens of arrays [B, T, ...]."""
        return jax.lax.all_gather(tree, self.axes, axis=1, tiled=True)

    def to_heads(self, x_BTH: jax.Array) -> jax.Array:
        """From a device's tokens and all heads to all tokens and a device's heads."""
        return jax.lax.all_to_all(x_BTH, self.axes, split_axis=2, concat_axis=1, tiled=True)

    def to_tokens(self, x_BSH: jax.Array) -> jax.Array:
        """`to_heads` undone."""
        return jax.lax.all_to_all(x_BSH, self.axes, split_axis=1, concat_axis=2, tiled=True)


def _only(walk: Any) -> Any:
    """Of a walk over one step."""
    return jax.tree.map(lambda table: table[0], walk)


def _heads_first(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: Tokens
) -> tuple[jax.Array, Keys]:
    """Scaled queries [B, G, R, T, K]; keys and values [B, G, S, K] with their tokens."""
    q_BGRTK = _group(q / math.sqrt(q.shape[3]), k.shape[2]).astype(q.dtype)
    return q_BGRTK, Keys(_swap(k), _swap(v), tokens)


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _group(x_BTHK: jax.Array, num_groups: int) -> jax.Array:
    """[B, T, H, *] to [B, G, R, T, *]."""
    b, t, h, *rest = x_BTHK.shape
    return _swap(x_BTHK).reshape(b, num_groups, h // num_groups, t, *rest)


def _ungroup(x_BGRTK: jax.Array, dtype: Any) -> jax.Array:
    """[B, G, R, T, *] to [B, T, H, *]."""
    b, g, r, *rest = x_BGRTK.shape
    return _swap(x_BGRTK.reshape(b, g * r, *rest)).astype(dtype)


def _finish_gradients(grads: Gradients, q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
    """Gradients of the arrays as they were given."""
    q_grad = _ungroup(grads.q / math.sqrt(q.shape[3]), q.dtype)
    return q_grad, _swap(grads.k).astype(k.dtype), _swap(grads.v).astype(v.dtype)


def _by_tokens(batch: tuple[str, ...], axes: tuple[str, ...], heads: tuple[str, ...]) -> P:
    return to_spec([batch, axes, heads])


def _ring_forward(split: Split, qkv: Arrays, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    q, k, v = qkv
    q_BGRTK, held = _heads_first(q, k, v, tokens)

    def step(carry: tuple[Any, Keys], walk: Any, ring: RingStep) -> tuple[Any, Keys]:
        running, held = carry
        # Sent before it is needed: the compute below, which needs it not, can hide the transfer.
        coming = split.send(held, distance=ring.distance_out)
        return split.by.attend(running, q_BGRTK, tokens, held, walk), coming

    running, _ = split.go_round(step, (split.by.begin(q_BGRTK, held), held))
    out, log_total = split.by.finish(running)
    return _ungroup(out, q.dtype), _ungroup(log_total, jnp.float32)


def _ring_backward(split: Split, saved: Any, tokens: Tokens, out: jax.Array, out_grad: jax.Array):
    q, k, v, log_total = saved
    q_BGRTK, held = _heads_first(q, k, v, tokens)
    group = functools.partial(_group, num_groups=k.shape[2])
    result = Result(group(out_grad), group(log_total), group(output_dot(out, out_grad)))
    zeros = zero_gradients(q_BGRTK, held)

    def step(carry: tuple[Gradients, Keys], walk: Any, ring: RingStep):
        grads, held = carry
        coming = split.send(held, distance=ring.distance_out)
        # The gradients of keys go round with them, and are added to when they are here.
        arriving = split.send(grads[1:], distance=ring.distance_in)
        own = Gradients(grads.q, zeros.k, zeros.v)
        own = split.by.gradients(own, q_BGRTK, tokens, result, held, walk)
        return Gradients(own.q, *map(jnp.add, own[1:], arriving)), coming

    grads, _ = split.go_round(step, (zeros, held))
    last, _ = split.placement.ring()[-1]
    home = split.send(grads[1:], distance=split.placement.num_devices - last if last else 0)
    return _finish_gradients(Gradients(grads.q, *home), q, k, v)


def _here(
    split: Split,
    tiles: Tiles,
    queries: Tokens,
    keys: Tokens,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Attention where all keys are at hand: output and log_total [B, T, H]."""
    q_BGRTK, held = _heads_first(q, k, v, keys)
    walk = _only(split.by.walk([tiles], split.axes))
    running = split.by.attend(split.by.begin(q_BGRTK, held), q_BGRTK, queries, held, walk)
    out, log_total = split.by.finish(running)
    return _ungroup(out, q.dtype), _ungroup(log_total, jnp.float32)


def _here_backward(
    split: Split,
    tiles: Tiles,
    queries: Tokens,
    keys: Tokens,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    results: Sequence[jax.Array],
) -> Gradients:
    """Gradients of `_here`, out of the output's gradient, log_total and `output_dot`."""
    q_BGRTK, held = _heads_first(q, k, v, keys)
    return split.by.gradients(
        zero_gradients(q_BGRTK, held),
        q_BGRTK,
        queries,
        Result(*(_group(x, k.shape[2]) for x in results)),
        held,
        _only(split.by.walk([tiles], split.axes)),
    )


def _gather_forward(split: Split, qkv: Arrays, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    q, k, v = qkv
    all_k, all_v, keys = split.gather((k, v, tokens))
    return _here(split, split.placement.gathered(), tokens, keys, q, all_k, all_v)


def _gather_backward(split: Split, saved: Any, tokens: Tokens, out: jax.Array, out_grad: jax.Array):
    q, k, v, log_total = saved
    all_k, all_v, keys = split.gather((k, v, tokens))
    results = out_grad, log_total, output_dot(out, out_grad)
    tiles = split.placement.gathered()
    grads = _here_backward(split, tiles, tokens, keys, q, all_k, all_v, results)
    k_grad, v_grad = (
        jax.lax.psum_scatter(x, split.axes, scatter_dimension=2, tiled=True)
        for x in (grads.k, grads.v)
    )
    return _finish_gradients(Gradients(grads.q, k_grad, v_grad), q, k, v)


def _by_heads(batch: tuple[str, ...], axes: tuple[str, ...], heads: tuple[str, ...]) -> P:
    return to_spec([batch, (), (*heads, *axes)])


def _ulysses_enter(split: Split, q: jax.Array, k: jax.Array, v: jax.Array) -> Arrays:
    k, v = (jnp.repeat(x, split.kv_copies, axis=2) for x in (k, v))
    return tuple(split.to_heads(x) for x in (q, k, v))


def _ulysses_forward(split: Split, qkv: Arrays, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
    everywhere = split.gather(tokens)
    out, log_total = _here(split, split.placement.whole(), everywhere, everywhere, *qkv)
    return split.to_tokens(out), log_total


def _ulysses_backward(
    split: Split, saved: Any, tokens: Tokens, out: jax.Array, out_grad: jax.Array
):
    q, k, v, log_total = saved
    everywhere = split.gather(tokens)
    results = split.to_heads(out_grad), log_total, split.to_heads(output_dot(out, out_grad))
    tiles = split.placement.whole()
    grads = _here_backward(split, tiles, everywhere, everywhere, q, k, v, results)
    q, k, v = (split.to_tokens(x) for x in _finish_gradients(grads, q, k, v))
    b, t, g, width = k.shape
    copied = (b, t, g // split.kv_copies, split.kv_copies, width)
    return q, *(x.reshape(copied).sum(3, dtype=jnp.float32).astype(x.dtype) for x in (k, v))


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to attend over a split sequence.

    Attributes:
        entered: how queries, keys, values (and log_total) then lie: a spec, out of the mesh axes of
            batch, sequence and heads.
        forward: `(split, (q, k, v), tokens) -> (out, log_total)`, on a device's shards.
        backward: `(split, (q, k, v, log_total), tokens, out, out_grad) -> gradients`.
        enter: `(split, q, k, v) -> (q, k, v)`, what is sent before; a step of its own, so that a
            backward pass which has kept a kernel's results need not run that again for it.
    """

    entered: Callable[..., P]
    forward: Callable[[Split, Arrays, Tokens], tuple[jax.Array, jax.Array]]
    backward: Callable[..., Arrays]
    enter: Callable[..., Arrays] | None = None


METHODS: Mapping[str, Method] = {
    "ring": Method(_by_tokens, _ring_forward, _ring_backward),
    "all_gather": Method(_by_tokens, _gather_forward, _gather_backward),
    "ulysses": Method(_by_heads, _ulysses_forward, _ulysses_backward, _ulysses_enter),
}
