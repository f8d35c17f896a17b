"""What XLA's CPU compiler must be told to be fast; on other platforms nothing is done."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from spmd_train.parallel.rules import current_layout, current_platform


def flat_tokens(*sequences: str) -> bool:
    """Whether [batch, tokens, ...] is to be made [batch * tokens, ...] where that makes matmuls.

    Tokens of split sequences cannot be one dim without gathering them.

    Args:
        sequences: logical axes of the tokens; default: `sequence`.
    """
    layout = current_layout()
    split = layout is not None and any(layout.axes(s) for s in sequences or ("sequence",))
    return current_platform() == "cpu" and not split


MatrixProduct = Callable[[jax.Array, jax.Array, tuple[int, int]], jax.Array]
"""Of two matrices, summed over these dims of them; what is left of the first leads the result."""


def matrix_product() -> MatrixProduct | None:
    """How a projection's tokens are best multiplied as one dim; None: they are not made one."""
    if not flat_tokens():
        return None
    layout = current_layout()
    return _apart if layout is None or layout.computes_whole else together


def together(a: jax.Array, b: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """A `MatrixProduct`."""
    return jax.lax.dot_general(a, b, (((summed[0],), (summed[1],)), ((), ())))


def _apart(a: jax.Array, b: jax.Array, summed: tuple[int, int]) -> jax.Array:
    """The same, with the rows of the result apart in memory.

    Eigen writes a column of many rows at a time. Rows that are a multiple of 2 KiB apart fall on
    the same few lines of a cache, and push each other out of it; so the result is made a cache line
    wider, and cut.
    """
    kept, num_rows = 1 - summed[1], a.shape[1 - summed[0]]
    width = b.shape[kept]
    if width % 512 or num_rows < 512:
        return together(a, b, summed)
    wider = [(0, 16 * (dim == kept)) for dim in (0, 1)]
    return together(a, jnp.pad(b, wider), summed)[:, :width]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_normalize(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """`x / rms(x) * scale`, whose derivative sums by matmuls, which take fewer passes.

    Args:
        x: float32 [..., N].
        scale: float32 [N].
        epsilon: added to the mean of squares.

    Returns:
        float32 [..., N].
    """
    return _rms_normalize_fwd(x, scale, epsilon)[0]


def _rms_normalize_fwd(x: jax.Array, scale: jax.Array, epsilon: float):
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return x * inverse * scale, (x, inverse, scale)


def _rms_normalize_bwd(
    epsilon: float, saved: tuple[jax.Array, jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale = saved
    gx_2d = (g * x).reshape(-1, x.shape[-1])
    mean = (gx_2d @ scale).reshape(inverse.shape) / x.shape[-1]
    dx = inverse * (g * scale - x * (jnp.square(inverse) * mean))
    return dx, inverse.reshape(-1) @ gx_2d


rms_normalize.defvjp(_rms_normalize_fwd, _rms_normalize_bwd)
