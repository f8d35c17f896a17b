"""Token and position embeddings."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_train.config import RopeConfig
from spmd_train.nn.cpu import computed_once
from spmd_train.nn.params import normal, param
from spmd_train.parallel.manual import columns_to_keep, take_rows
from spmd_train.parallel.rules import unshard


class Embedding(nnx.Module):
    """A table of vectors, looked up by integer."""

    def __init__(
        self,
        num_rows: int,
        size: int,
        axes: tuple[str, str],
        *,
        scale: float,
        dtype: str,
        rngs: nnx.Rngs,
    ) -> None:
        """Makes the table [num_rows, size]."""
        self.axes = axes
        self.table = param(rngs, (num_rows, size), axes, init=normal(scale), dtype=dtype)

    def __call__(self, ids_BT: jax.Array, *, path: str, dtype: jnp.dtype) -> jax.Array:
        """Looks int32 [B, T] up as [B, T, size] in `dtype`; `path` is the module's own."""
        told: Any = {"axes": self.axes, "tokens": ("batch", "sequence")}
        columns = columns_to_keep(f"{path}/table", shape=self.table.shape, ids=ids_BT, **told)
        params: Any = unshard(nnx.split(self)[1], path, dtype=dtype, keep=columns)
        return take_rows(params["table"][...], ids_BT, columns=columns, **told)


def rope_frequencies(config: RopeConfig, *, head_dim: int) -> jax.Array:
    """Angular frequencies in radians per position, float32 [head_dim / 2].

    Su et al., arXiv:2104.09864; `scaling="llama3"` divides frequencies whose wavelength exceeds the
    original context by `factor`, with a smooth passage (Llama 3.1's released `apply_scaling`).
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / (config.theta**exponent)
    if config.scaling == "none":
        return frequency
    wavelength = 2 * math.pi / frequency
    original, low, high = (
        config.original_max_positions,
        config.low_freq_factor,
        config.high_freq_factor,
    )
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequency / config.factor + smooth * frequency
    scaled = jnp.where(wavelength > original / low, frequency / config.factor, blended)
    return jnp.where(wavelength < original / high, frequency, scaled)


def rope_angles(
    positions_BT: jax.Array, config: RopeConfig, *, head_dim: int
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of each position's angles, float32 [B, T, 1, head_dim / 2]."""
    frequency = rope_frequencies(config, head_dim=head_dim)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency
    return computed_once(jnp.cos(angle)), computed_once(jnp.sin(angle))


def apply_rope(x_BTHK: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the pairs (i, i + K/2) of each head, in float32 (the layout of Llama's HF port)."""
    cos, sin = angles
    a, b = jnp.split(x_BTHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTHK.dtype)
