"""Normalization, computed in float32 whatever the dtype of activations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_train.nn.params import ones, param, zeros


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim (Zhang and Sennrich, arXiv:1910.07467)."""

    def __init__(self, size: int, *, epsilon: float, dtype: str, rngs: nnx.Rngs) -> None:
        """Makes the scale [size]."""
        self.epsilon = epsilon
        self.scale = param(rngs, (size,), ("norm",), init=ones, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes [..., size]."""
        x32 = x.astype(jnp.float32)
        scale = self.scale[...].astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        y = x32 * jax.lax.rsqrt(variance + self.epsilon)
        return (y * scale).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last dim (Ba et al., arXiv:1607.06450)."""

    def __init__(self, size: int, *, epsilon: float, dtype: str, rngs: nnx.Rngs) -> None:
        """Makes scale and bias, both [size]."""
        self.epsilon = epsilon
        self.scale = param(rngs, (size,), ("norm",), init=ones, dtype=dtype)
        self.bias = param(rngs, (size,), ("norm",), init=zeros, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalizes [..., size]."""
        x32 = x.astype(jnp.float32)
        centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.epsilon)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (y * scale + bias).astype(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}
