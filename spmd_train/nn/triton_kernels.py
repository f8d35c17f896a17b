"""Flash attention of GPUs in Pallas on Triton: FlashAttention-2, Dao, arXiv:2307.08691.

Its loops are those of `jax.experimental.pallas.ops.gpu.attention`. That has one array of segments,
for queries and keys alike, and so cannot attend to the keys of another device; this has one for
each. And it knows a soft cap, a window, and fewer key heads than query heads.

Queries and keys lie in runs (`nn.runs`). Where these start is told by arrays, so that one program
serves devices that hold different tokens. Blocks of which the causal mask and the window leave
nothing are not computed. Inside, exponentials are of base 2.

Dims: B batch, T queries, S keys, H query heads, G key heads, R = H / G, K head width.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from spmd_train.nn.runs import Block, Runs, keys_met, queries_met
from spmd_train.parallel.by_kernel import Scoring

_LOG2_E = math.log2(math.e)
_LOWEST = -0.7 * float(jnp.finfo(jnp.float32).max)

Segments = tuple[jax.Array, jax.Array]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    runs: Runs,
    scoring: Scoring,
    *,
    block: Block,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, T, K] and log of the sum of exponentials, float32 [B, H, T].

    Args:
        q: scaled queries [B, H, T, K].
        k: keys [B, G, S, K].
        v: values.
        segments: int32, of queries [B, T] and keys [B, S].
        runs: this device's, of one step.
        scoring: soft cap and window.
        block: tokens that a program takes at one time.
        interpret: on CPU.
    """
    (b, h, t, width), s, copies = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    wide = pl.next_power_of_2(width)
    queries = pl.BlockSpec((None, None, block.queries, wide), lambda i, b, h: (b, h, i, 0))
    keys = pl.BlockSpec((None, None, s, wide), lambda i, b, h: (b, h // copies, 0, 0))
    totals = pl.BlockSpec((None, None, block.queries), lambda i, b, h: (b, h, i))
    return pl.pallas_call(
        functools.partial(_forward, scoring=scoring, block=block, width=width),
        grid=(t // block.queries, b, h),
        in_specs=[
            *(queries, keys, keys),
            pl.BlockSpec((None, block.queries), lambda i, b, h: (b, i)),
            pl.BlockSpec((None, s), lambda i, b, h: (b, 0)),
            pl.BlockSpec((None,), lambda i, b, h: (i,)),
            pl.BlockSpec(runs.keys.shape, lambda i, b, h: (0,)),
        ],
        out_specs=[queries, totals],
        out_shape=[q, jax.ShapeDtypeStruct((b, h, t), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=2),
        interpret=interpret,
        name="attention_forward",
    )(q, k, v, *segments, _firsts(runs.queries, t, block.queries), runs.keys)


def queries_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    runs: Runs,
    scoring: Scoring,
    *,
    out_grad: jax.Array,
    log_total: jax.Array,
    dot: jax.Array,
    block: Block,
    interpret: bool,
) -> jax.Array:
    """The gradient of q.

    Args:
        q: as of `forward`, and so k, v, segments, runs, scoring, block, interpret.
        k: keys.
        v: values.
        segments: of queries and keys.
        runs: this device's.
        scoring: soft cap and window.
        out_grad: [B, H, T, K].
        log_total: of the softmax over these and more keys, float32 [B, H, T].
        dot: sum over K of the output times its gradient, float32 [B, H, T].
        block: tokens that a program takes at one time.
        interpret: on CPU.
    """
    (b, h, t, width), s, copies = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    wide = pl.next_power_of_2(width)
    queries = pl.BlockSpec((None, None, block.queries, wide), lambda i, b, h: (b, h, i, 0))
    keys = pl.BlockSpec((None, None, s, wide), lambda i, b, h: (b, h // copies, 0, 0))
    totals = pl.BlockSpec((None, None, block.queries), lambda i, b, h: (b, h, i))
    return pl.pallas_call(
        functools.partial(_queries_backward, scoring=scoring, block=block, width=width),
        grid=(t // block.queries, b, h),
        in_specs=[
            *(queries, keys, keys, queries, totals, totals),
            pl.BlockSpec((None, block.queries), lambda i, b, h: (b, i)),
            pl.BlockSpec((None, s), lambda i, b, h: (b, 0)),
            pl.BlockSpec((None,), lambda i, b, h: (i,)),
            pl.BlockSpec(runs.keys.shape, lambda i, b, h: (0,)),
        ],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_queries_backward",
    )(
        *(q, k, v, out_grad, log_total, dot, *segments),
        *(_firsts(runs.queries, t, block.queries), runs.keys),
    )


def keys_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: Segments,
    runs: Runs,
    scoring: Scoring,
    *,
    out_grad: jax.Array,
    log_total: jax.Array,
    dot: jax.Array,
    block: Block,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v; arguments as of `queries_backward`.

    A program has a block of keys, and goes over all query heads that look at it.
    """
    (b, h, t, width), (_, g, s, _) = q.shape, k.shape
    copies, wide = h // g, pl.next_power_of_2(width)
    queries = pl.BlockSpec((None, copies, t, wide), lambda i, b, g: (b, g, 0, 0))
    keys = pl.BlockSpec((None, None, block.keys, wide), lambda i, b, g: (b, g, i, 0))
    totals = pl.BlockSpec((None, copies, t), lambda i, b, g: (b, g, 0))
    k_grad, v_grad = pl.pallas_call(
        functools.partial(_keys_backward, scoring=scoring, block=block, width=width),
        grid=(s // block.keys, b, g),
        in_specs=[
            *(queries, keys, keys, queries, totals, totals),
            pl.BlockSpec((None, t), lambda i, b, g: (b, 0)),
            pl.BlockSpec((None, block.keys), lambda i, b, g: (b, i)),
            pl.BlockSpec((None,), lambda i, b, g: (i,)),
            pl.BlockSpec(runs.queries.shape, lambda i, b, g: (0,)),
        ],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attention_keys_backward",
    )(
        *(q, k, v, out_grad, log_total, dot, *segments),
        *(_firsts(runs.keys, s, block.keys), runs.queries),
    )
    return k_grad, v_grad


def _forward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    q_ids_ref: Any,
    k_ids_ref: Any,
    first_ref: Any,
    starts_ref: Any,
    out_ref: Any,
    log_total_ref: Any,
    *,
    scoring: Scoring,
    block: Block,
    width: int,
) -> None:
    q, q_ids, first = _load(q_ref, width), q_ids_ref[...], first_ref[...]
    size = k_ref.shape[0] // starts_ref.shape[0]

    def run(n: Any, running: Any) -> Any:
        distance = first - starts_ref[n]

        def step(j: Any, running: Any) -> Any:
            highest, total, out = running
            here = pl.dslice(n * size + j * block.keys, block.keys)
            k, v = (_load(ref.at[here], width) for ref in (k_ref, v_ref))
            away = distance - j * block.keys
            scores, _ = _scores(q, k, q_ids, k_ids_ref[here], away, scoring)
            new = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights = jnp.exp2(scores - new[:, None])
            shrink = jnp.exp2(highest - new)
            out = out * shrink[:, None] + triton.dot(weights.astype(v.dtype), v)
            return new, total * shrink + jnp.sum(weights, axis=1), out

        return jax.lax.fori_loop(*keys_met(distance, size, block, scoring.window), step, running)

    zeros = jnp.zeros(q.shape, jnp.float32)
    nothing = jnp.full(q.shape[:1], _LOWEST, jnp.float32), jnp.sum(zeros, axis=1), zeros
    highest, total, out = jax.lax.fori_loop(0, starts_ref.shape[0], run, nothing)
    log_total_ref[...] = (highest + jnp.log2(total)) / _LOG2_E
    _store(out_ref, out / total[:, None], width)


def _queries_backward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_grad_ref: Any,
    log_total_ref: Any,
    dot_ref: Any,
    q_ids_ref: Any,
    k_ids_ref: Any,
    first_ref: Any,
    starts_ref: Any,
    q_grad_ref: Any,
    *,
    scoring: Scoring,
    block: Block,
    width: int,
) -> None:
    q, out_grad = (_load(ref, width) for ref in (q_ref, out_grad_ref))
    q_ids, first = q_ids_ref[...], first_ref[...]
    log_total, dot = log_total_ref[...], dot_ref[...]
    size = k_ref.shape[0] // starts_ref.shape[0]

    def run(n: Any, grad: Any) -> Any:
        distance = first - starts_ref[n]

        def step(j: Any, grad: Any) -> Any:
            here = pl.dslice(n * size + j * block.keys, block.keys)
            k, v = (_load(ref.at[here], width) for ref in (k_ref, v_ref))
            away = distance - j * block.keys
            scores, slope = _scores(q, k, q_ids, k_ids_ref[here], away, scoring)
            weights = jnp.exp2(scores - log_total[:, None] * _LOG2_E)
            weights_grad = triton.dot(out_grad, v, trans_b=True)
            scores_grad = weights * (weights_grad - dot[:, None]) * slope
            return grad + triton.dot(scores_grad.astype(k.dtype), k)

        return jax.lax.fori_loop(*keys_met(distance, size, block, scoring.window), step, grad)

    zeros = jnp.zeros(q.shape, jnp.float32)
    _store(q_grad_ref, jax.lax.fori_loop(0, starts_ref.shape[0], run, zeros), width)


def _keys_backward(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_grad_ref: Any,
    log_total_ref: Any,
    dot_ref: Any,
    q_ids_ref: Any,
    k_ids_ref: Any,
    first_ref: Any,
    starts_ref: Any,
    k_grad_ref: Any,
    v_grad_ref: Any,
    *,
    scoring: Scoring,
    block: Block,
    width: int,
) -> None:
    k, v = (_load(ref, width) for ref in (k_ref, v_ref))
    k_ids, first = k_ids_ref[...], first_ref[...]
    copies, size = q_ref.shape[0], q_ref.shape[1] // starts_ref.shape[0]

    def run(n: Any, grads: Any) -> Any:
        # One after another: the runs of each head.
        head, n = jax.lax.div(n, starts_ref.shape[0]), jax.lax.rem(n, starts_ref.shape[0])
        distance = starts_ref[n] - first

        def step(i: Any, grads: Any) -> Any:
            k_grad, v_grad = grads
            here = pl.dslice(n * size + i * block.queries, block.queries)
            q, out_grad = (_load(ref.at[head, here], width) for ref in (q_ref, out_grad_ref))
            away = distance + i * block.queries
            scores, slope = _scores(q, k, q_ids_ref[here], k_ids, away, scoring)
            weights = jnp.exp2(scores - log_total_ref[head, here][:, None] * _LOG2_E)
            weights_grad = triton.dot(out_grad, v, trans_b=True)
            scores_grad = weights * (weights_grad - dot_ref[head, here][:, None]) * slope
            return (
                k_grad + triton.dot(scores_grad.astype(q.dtype), q, trans_a=True),
                v_grad + triton.dot(weights.astype(out_grad.dtype), out_grad, trans_a=True),
            )

        return jax.lax.fori_loop(*queries_met(distance, size, block, scoring.window), step, grads)

    zeros = jnp.zeros(k.shape, jnp.float32)
    grads = jax.lax.fori_loop(0, copies * starts_ref.shape[0], run, (zeros, zeros))
    for ref, grad in zip((k_grad_ref, v_grad_ref), grads, strict=True):
        _store(ref, grad, width)


def _scores(
    q: jax.Array, k: jax.Array, q_ids: jax.Array, k_ids: jax.Array, away: Any, scoring: Scoring
) -> tuple[jax.Array, jax.Array | float]:
    """Of a block, for `exp2`, and the soft cap's derivative; `away`: of its first query and key."""
    scores, slope = triton.dot(q, k, trans_b=True), 1.0
    if scoring.softcap:
        bent = jnp.tanh(scores / scoring.softcap)
        scores, slope = scoring.softcap * bent, 1 - bent * bent
    away += jnp.arange(q.shape[0])[:, None] - jnp.arange(k.shape[0])[None, :]
    seen = (q_ids[:, None] == k_ids[None, :]) & (away >= 0)
    if scoring.window:
        seen &= away < scoring.window
    return jnp.where(seen, scores * _LOG2_E, _LOWEST), slope


def _firsts(starts: jax.Array, length: int, size: int) -> jax.Array:
    """Int32 [length / size]: where each block of runs starts."""
    of_run = jnp.arange(0, length // starts.shape[0], size, dtype=jnp.int32)
    return (starts[:, None] + of_run).reshape(-1)


def _load(ref: Any, width: int) -> jax.Array:
    """[N, K], zeros beyond the width: a block is as wide as a power of two."""
    mask = (jnp.arange(ref.shape[-1]) < width)[None, :]
    return triton.load(ref, mask=mask, other=0.0)


def _store(ref: Any, x: jax.Array, width: int) -> None:
    mask = (jnp.arange(ref.shape[-1]) < width)[None, :]
    triton.store(ref, x.astype(ref.dtype), mask=mask)
