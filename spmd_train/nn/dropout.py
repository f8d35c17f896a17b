"""Dropout whose mask depends on the example, not on the mesh."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from spmd_train.parallel.rules import constrain
from spmd_train.parallel.sequence import place


@dataclasses.dataclass(frozen=True)
class DropoutKeys:
    """One random key per example, so that no sharding or accumulation changes a mask.

    Attributes:
        rate: probability that a value is dropped.
        keys_B: a typed key per row of the batch.
    """

    rate: float
    keys_B: jax.Array

    def fold_in(self, data: jax.Array | int) -> DropoutKeys:
        """Keys for one place in the network, or one layer."""
        fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))
        return DropoutKeys(self.rate, fold(self.keys_B, data))

    def drop(self, x_BTD: jax.Array) -> jax.Array:
        """Zeroes values at `rate` and scales the others by 1 / (1 - rate)."""
        shape = x_BTD.shape[1:]
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, shape))(self.keys_B)
        keep = place(keep, ("batch", "sequence", None))  # The mask is the token's, wherever it is.
        keep = constrain(keep, ("batch", "residual_sequence", None))
        return jnp.where(keep, x_BTD / (1 - self.rate), 0).astype(x_BTD.dtype)


jax.tree_util.register_dataclass(DropoutKeys, data_fields=["keys_B"], meta_fields=["rate"])


def dropout_keys(rate: float, key: jax.Array, rows_B: jax.Array) -> DropoutKeys:
    """Keys of a step for the examples at `rows_B` of the global batch (int32 [B])."""
    return DropoutKeys(rate, jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows_B))
