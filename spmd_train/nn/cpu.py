"""What XLA's CPU compiler must be told to be fast; on other platforms nothing is done."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spmd_train.parallel.rules import current_platform


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
