"""Updates of parameters that are kept in bfloat16."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from spmd_train.parallel.rules import leaf_path


def apply_updates_stochastically(params: Any, updates: Any, *, key: jax.Array) -> Any:
    """`optax.apply_updates`, but sums are rounded to bfloat16 at random.

    bfloat16 has 8 bits: rounded to the nearest, a parameter loses each update that is less than
    1/512 of it. Rounded up or down in proportion to the distance (Gupta et al., arXiv:1502.02551),
    it is right on average.

    Args:
        params: a tree of arrays; those in other dtypes are updated as optax does.
        updates: the same, in float32.
        key: of the step; each leaf's is made of it and the leaf's path, so that what is drawn
            depends neither on other leaves nor on the mesh.

    Returns:
        The new parameters, in their dtypes.
    """

    def one(path: Any, param: jax.Array, update: jax.Array) -> jax.Array:
        new = param.astype(jnp.float32) + update.astype(jnp.float32)
        if param.dtype != jnp.bfloat16:
            return new.astype(param.dtype)
        return round_stochastically(
            new, key=jax.random.fold_in(key, zlib.crc32(leaf_path(path).encode()))
        )

    return jax.tree_util.tree_map_with_path(one, params, updates)


def round_stochastically(x: jax.Array, *, key: jax.Array) -> jax.Array:
    """Rounds float32 to one of the two bfloat16 beside it, so that the expectation is `x`.

    Args:
        x: float32. What is no finite number stays what it is.
        key: a random key.

    Returns:
        The same shape, bfloat16.
    """
    # A bfloat16 is the upper half of a float32: a random lower half carries over in proportion.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    upper = (bits >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))
