"""The seam between what is learnt and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from flax import nnx

from spmd_train.nn.projection import Operands
from spmd_train.parallel.rules import LogicalAxes
from spmd_train.parallel.stages import Layers

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


def add_sums(a: LossOutput, b: LossOutput) -> LossOutput:
    """The sums of two together; what only one of them counts is as it is there."""
    metrics = a.metric_sums | {
        name: a.metric_sums[name] + x if name in a.metric_sums else x
        for name, x in b.metric_sums.items()
    }
    return LossOutput(a.loss_sum + b.loss_sum, a.weight_sum + b.weight_sum, metrics)


class LayersOutput(NamedTuple):
    """What a run of some layers gives.

    Attributes:
        x: what leaves the last of them, [B, T, D].
        sums: what they add to those of the head, such as the losses of routers; None: nothing.
            Arrays with a dim of layers have all the network's, zero for those that did not run.
        operands: of what the gradients of kernels are made, stacked; None without taps.
    """

    x: jax.Array
    sums: LossOutput | None
    operands: Operands | None


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


@runtime_checkable
class LayeredTask(Task, Protocol):
    """A task whose model is like layers between an embedding and a head, so that it has stages.

    `loss` is `head` of `run_layers` of `embed`, and what the layers add. The model's parameters of
    the layers are stacked along the first dim, under the one key `stack`.
    """

    @property
    def stack(self) -> str:
        """Where the layers are among the parameters."""
        ...

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        ...

    @property
    def compute_dtype(self) -> str:
        """The dtype of activations and of the matrices they are multiplied by."""
        ...

    @property
    def head_layers(self) -> float:
        """FLOPs of the head's forward pass, in those of one layer's."""
        ...

    def embed(self, model: nnx.Module, batch: Batch, *, key: jax.Array | None) -> jax.Array:
        """What enters the first layer, [B, T, D]."""
        ...

    def run_layers(
        self,
        model: nnx.Module,
        x: jax.Array,
        batch: Batch,
        *,
        key: jax.Array | None,
        layers: Layers | None = None,
        taps: dict[str, jax.Array] | None = None,
    ) -> LayersOutput:
        """Runs the layers that the model has.

        Args:
            model: with all layers, or some.
            x: what enters them.
            batch: where it comes from.
            key: of the step; None in evaluation.
            layers: which of the network's they are; None: all.
            taps: to leave the gradients of kernels for later, as `nn.projection.Tape` does: arrays
                like the outputs of the projections by their paths in a layer, stacked.

        Returns:
            The output.
        """
        ...

    def head(self, model: nnx.Module, x: jax.Array, batch: Batch) -> LossOutput:
        """The loss, from what leaves the last layer."""
        ...
