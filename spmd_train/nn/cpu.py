"""What XLA's CPU compiler must be told to be fast; on other platforms nothing is done."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spmd_train.parallel.manual import no_gradient
from spmd_train.parallel.rules import current_layout, current_platform

MatrixProduct = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""Of two matrices, summed over these dims of them; what is left of the first leads the result."""


def matrix_product() -> MatrixProduct | None:
    """How a projection's tokens are best multiplied as one dim; None: they are not made one.

    Tokens of split sequences cannot be one dim without gathering them.
    """
    layout = current_layout()
    if current_platform() != "cpu" or (layout is not None and layout.axes("sequence")):
        return None
    return _apart if layout is None or layout.computes_whole else together


def together(a: jax.Array, b: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """A `MatrixProduct`."""
    return _dot(a, b, summed).astype(a.dtype)


def _dot(a: jax.Array, b: jax.Array, summed: tuple[int, int], *, num_batch: int = 0) -> jax.Array:
    """Sums over these dims of two arrays, whose first dims are `num_batch` alike.

    YNNPACK multiplies bfloat16 (`xla_flags.program_options`) where the last dim of `a` is summed
    over and the result is float32, which it is for bfloat16 and float32. What XLA leaves bfloat16
    for it and YNNPACK then refuses ends the program: what it may refuse is made float32 here.
    """
    wide = None
    if a.dtype == jnp.bfloat16:
        wide = jnp.float32
        if summed[0] != a.ndim - 1:
            a, b = a.astype(wide), b.astype(wide)
    batch = tuple(range(num_batch))
    dims = ((summed[0],), (summed[1],)), (batch, batch)
    return jax.lax.dot_general(a, b, dims, preferred_element_type=wide)


def _apart(a: jax.Array, b: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """The same; of float32 the rows of what is read or written by columns are apart in memory.

    Eigen writes a column of many rows at a time, and reads one of a matrix that is summed over its
    rows. Rows that are a multiple of 2 KiB apart fall on the same few lines of a cache, and push
    each other out of it; so they are made a cache line wider, and the result is cut.
    """
    if a.dtype != jnp.float32:
        return together(a, b, summed)
    kept, num_rows = [1 - summed[0], 1 - summed[1]], a.shape[1 - summed[0]]
    out_shape = num_rows, b.shape[kept[1]]
    if out_shape[1] % 512 == 0 and num_rows >= 512:
        b = _wider(b, kept[1])
    if num_rows % 512 == 0 and kept[0] == 1:
        a = _wider(a, 1)
    return together(a, b, summed)[: out_shape[0], : out_shape[1]]


def _wider(x: jax.Array, dim: int) -> jax.Array:
    return jnp.pad(x, [(0, 16 * (d == dim)) for d in range(x.ndim)])


def computed_once(x: jax.Array) -> jax.Array:
    """The same float32 array, which its readers read instead of computing it once more.

    XLA fuses whatever is elementwise into each of its readers, be it as dear as a sine, and drops
    barriers before it does so. Matmuls it leaves alone: this one, with the identity, is exact.

    Args:
        x: [..., N], finite.

    Returns:
        The same; on other platforms than CPUs `x` itself.
    """
    if current_platform() != "cpu":
        return x
    return jnp.dot(x, jnp.eye(x.shape[-1], dtype=x.dtype), precision=jax.lax.Precision.HIGHEST)


def cut(x: jax.Array, spans: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    """`[x[:, start:end] for start, end in spans]`, whose derivative has fewer passes.

    XLA's CPU compiler fills each part's gradient up with zeros to the length of `x`, in memory.

    Args:
        x: [B, T, ...].
        spans: together all of T; none starts or ends before the one before it.
    """
    if current_platform() == "cpu":
        return _cut(x, spans)
    return [x[:, start:end] for start, end in spans]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _cut(x: jax.Array, spans: tuple[tuple[int, int], ...]) -> list[jax.Array]:
    return [x[:, start:end] for start, end in spans]


def _cut_fwd(x: jax.Array, spans: tuple[tuple[int, int], ...]):
    return _cut(x, spans), None


def _cut_bwd(spans: tuple[tuple[int, int], ...], _: None, gradients: list[jax.Array]):
    done: list[jax.Array] = []
    at, total = 0, gradients[0]  # Of x[:, at:], as far as the last span goes.
    for (start, end), g in zip(spans[1:], gradients[1:], strict=True):
        shared = g.shape[1] - (end - at - total.shape[1])
        done.append(total[:, : start - at])
        total = jnp.concatenate([total[:, start - at :] + g[:, :shared], g[:, shared:]], axis=1)
        at = start
    return (jnp.concatenate([*done, total], axis=1),)


_cut.defvjp(_cut_fwd, _cut_bwd)


@jax.custom_vjp
def softmax_attend(
    q_BGXK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, visible_BTS: jax.Array
) -> jax.Array:
    """`softmax(q k^T) v` among what is visible, with a derivative of fewer and faster passes.

    As in FlashAttention (arXiv:2205.14135): the weights are divided by their sum after the product
    with `v`, and the softmax's derivative takes its dot product from the output. The gradients of
    keys and values are multiplied with keys last, which Eigen does faster.

    Args:
        q_BGXK: float32 or bfloat16; X is R heads of T queries each, scaled.
        k_BGSK: same dtype.
        v_BGSK: same dtype.
        visible_BTS: bool; each query sees a key.

    Returns:
        [B, G, X, K] in the same dtype.
    """
    return _softmax_attend_fwd(q_BGXK, k_BGSK, v_BGSK, visible_BTS)[0]


def _softmax_attend_fwd(
    q_BGXK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, visible_BTS: jax.Array
):
    b, t, s = visible_BTS.shape
    seen_BTS, dtype = visible_BTS, q_BGXK.dtype
    # Rows of scores apart in memory, as in `_apart`.
    if s % 512 == 0 and q_BGXK.shape[2] >= 128 and dtype == jnp.float32:
        k_BGSK, v_BGSK = (jnp.pad(x, ((0, 0), (0, 0), (0, 16), (0, 0))) for x in (k_BGSK, v_BGSK))
        seen_BTS = jnp.pad(visible_BTS, ((0, 0), (0, 0), (0, 16)))
    scores_BGXS = _dot(q_BGXK, k_BGSK, (3, 3), num_batch=2)
    scores_BGRTS = scores_BGXS.reshape(b, k_BGSK.shape[1], -1, t, seen_BTS.shape[2])
    lowest = jnp.finfo(jnp.float32).min
    scores_BGRTS = jnp.where(seen_BTS[:, None, None], scores_BGRTS, lowest)
    powers_BGRTS = jnp.exp(scores_BGRTS - jnp.max(scores_BGRTS, axis=-1, keepdims=True))
    share_BGX1 = 1 / jnp.sum(powers_BGRTS, axis=-1).reshape(*q_BGXK.shape[:3], 1)
    powers_BGXS = powers_BGRTS.reshape(scores_BGXS.shape).astype(dtype)
    out_BGXK = (_dot(powers_BGXS, v_BGSK, (3, 2), num_batch=2) * share_BGX1).astype(dtype)
    saved = q_BGXK, k_BGSK, v_BGSK, visible_BTS, powers_BGXS, share_BGX1, out_BGXK
    return out_BGXK, saved


def _softmax_attend_bwd(saved: tuple[jax.Array, ...], g_BGXK: jax.Array):
    q_BGXK, k_BGSK, v_BGSK, visible_BTS, powers_BGXS, share_BGX1, out_BGXK = saved
    dtype, shared_BGXK = g_BGXK.dtype, g_BGXK * share_BGX1
    # By a matmul: YNNPACK would take a sum into what reads it, and is slow at that.
    dot_BGX1 = (shared_BGXK * out_BGXK) @ jnp.ones((g_BGXK.shape[-1], 1), jnp.float32)
    g_BGXK = shared_BGXK.astype(dtype)
    weights_gradient = _dot(g_BGXK, v_BGSK, (3, 3), num_batch=2) - dot_BGX1
    scores_gradient = (powers_BGXS * weights_gradient).astype(dtype)
    dq_BGXK = _dot(scores_gradient, k_BGSK, (3, 2), num_batch=2).astype(dtype)
    s = visible_BTS.shape[2]
    dk_BGSK, dv_BGSK = (
        _dot(x, weights, (2, 2), num_batch=2)[..., :s].swapaxes(2, 3).astype(dtype)
        for x, weights in ((q_BGXK, scores_gradient), (g_BGXK, powers_BGXS))
    )
    return dq_BGXK, dk_BGSK, dv_BGSK, no_gradient(visible_BTS)


softmax_attend.defvjp(_softmax_attend_fwd, _softmax_attend_bwd)
