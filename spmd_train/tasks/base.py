"""The seam between what is learnt and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import jax
from flax import nnx

from spmd_train.parallel.rules import LogicalAxes

Batch = Mapping[str, jax.Array]
ModelState = dict[str, Any]
"""Nested dicts of arrays that are no parameters: names as in the module. Empty for most models."""


class LossOutput(NamedTuple):
    """Sums, never means: microbatches, devices and hosts add up exactly; the host divides.

    Attributes:
        loss_sum: what is minimized, summed over the tokens, float32 scalar.
        weight_sum: how many tokens that is, float32 scalar.
        metric_sums: other sums over tokens, float32: scalars; with experts also `expert_load`
            [L, E], how many tokens chose each expert, and `expert_dropped`, how many of these
            choices found it full.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    metric_sums: dict[str, jax.Array]


class Task(Protocol):
    """Something that can be learnt from batches."""

    def make_model(self, key: jax.Array) -> nnx.Module:
        """Builds the module with initial parameters."""
        ...

    def batch_shapes(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What a batch of `batch_size` examples holds."""
        ...

    def batch_axes(self) -> dict[str, LogicalAxes]:
        """Logical axes of each array of a batch; the first is always `batch`."""
        ...

    def loss(self, model: nnx.Module, batch: Batch, *, key: jax.Array | None) -> LossOutput:
        """The loss of a batch; `key` is the step's random key, None in evaluation."""
        ...

    def update_model_state(self, model_state: ModelState, sums: LossOutput) -> ModelState:
        """The model state after a step, from the sums of the whole global batch."""
        ...
