"""Layers to stages: who holds which in the tick loop, and how they get there and back.

Parameters keep the shape [layers, ...] and their numbers, whatever the pipeline. At the borders of
a step the functions here, inside a `shard_map`, make of a device's shards the layers of its stage,
whole over all axes that are taken by hand, and take the gradients the same way back:

| the leaf is sharded | in | out |
|---|---|---|
| by stage, on its first dim | nothing | nothing |
| over `pipeline`, on another dim | all-to-all: parts of all layers for own layers | all-to-all |
| not over `pipeline`, but stacked | its own layers | all-reduce |
| over another axis by hand | all-gather | reduce-scatter |
| not over an axis by hand | nothing | all-reduce |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.config import ConfigError

AXIS = "pipeline"


class Layers(NamedTuple):
    """Which layers of the whole network some stacked parameters are.

    Attributes:
        indices: int32 [N].
        exists: bool [N], False where a place of the stack is empty; None: all are filled.
    """

    indices: jax.Array
    exists: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Stages:
    """Which layers lie where.

    Attributes:
        num_layers: of the network.
        num_devices: P, the size of the mesh axis.
        num_chunks: V, virtual stages per device.
    """

    num_layers: int
    num_devices: int
    num_chunks: int

    @property
    def sizes(self) -> list[int]:
        """Layers of each virtual stage. The last ones have fewer: the head is there, too."""
        count = self.num_devices * self.num_chunks
        each, more = divmod(self.num_layers, count)
        return [each + (k < more) for k in range(count)]

    @property
    def is_even(self) -> bool:
        """Whether all virtual stages have as many layers."""
        return not self.num_layers % (self.num_devices * self.num_chunks)

    @property
    def in_order(self) -> bool:
        """Whether each device's layers are its even part of all, so that dim 0 can be sharded."""
        return self.is_even and self.num_chunks == 1

    @property
    def layers(self) -> np.ndarray:
        """The layers of each device's chunks, int32 [P, V, N]; -1: an empty place."""
        starts = np.cumsum([0, *self.sizes])
        table = np.full((self.num_devices, self.num_chunks, max(self.sizes)), -1, np.int32)
        for stage, size in enumerate(self.sizes):
            chunk, device = divmod(stage, self.num_devices)
            table[device, chunk, :size] = np.arange(starts[stage], starts[stage] + size)
        return table


def make_stages(num_layers: int, *, num_devices: int, num_chunks: int) -> Stages:
    """Divides the layers.

    Raises:
        ConfigError: there are fewer layers than virtual stages.
    """
    count = num_devices * num_chunks
    if num_layers < count:
        chunks = num_layers // num_devices
        cure = (
            f"set pipeline.virtual_stages to at most {chunks}"
            if chunks
            else f"set mesh.pipeline to at most {num_layers}"
        )
        raise ConfigError(
            f"model.num_layers: {num_layers} layers do not fill mesh.pipeline x "
            f"pipeline.virtual_stages = {num_devices} x {num_chunks} = {count} stages; {cure}, or "
            f"model.num_layers to at least {count}"
        )
    return Stages(num_layers, num_devices, num_chunks)


Dims = Sequence[tuple[str, ...]]
"""Mesh axes of each dim of a leaf."""


def by_hand(dims: Dims, hand: Collection[str]) -> Dims:
    """Only the mesh axes that a `shard_map` takes."""
    return [tuple(a for a in dim if a in hand) for dim in dims]


def gather(w: jax.Array, dims: Dims, *, own_layers: jax.Array | None, all_layers: np.ndarray):
    """A device's shard made whole: inside a `shard_map` over the axes in `dims`.

    Args:
        w: the shard.
        dims: its mesh axes by hand; the first of a dim is the outermost.
        own_layers: a stacked leaf: this device's layers, int32 [V N]; None: not stacked.
        all_layers: those of every device, [P, V N]; an empty place is -1.

    Returns:
        The leaf; of a stacked one, this device's layers [V N, ...]. An empty place holds some
        other layer's parameters.
    """
    stacked = own_layers is not None
    for i, dim in enumerate(dims):
        for axis in reversed(dim):
            if axis == AXIS and stacked:
                if i:
                    w = w[np.maximum(all_layers.reshape(-1), 0)]
                    w = jax.lax.all_to_all(w, AXIS, split_axis=0, concat_axis=i, tiled=True)
            else:
                w = jax.lax.all_gather(w, axis, axis=i, tiled=True)
    if stacked and not any(AXIS in dim for dim in dims):
        w = w[jnp.maximum(own_layers, 0)]
    return w


def reduce(
    g: jax.Array,
    dims: Dims,
    *,
    own_layers: jax.Array | None,
    all_layers: np.ndarray,
    num_layers: int,
    hand: Sequence[str],
) -> jax.Array:
    """The way back of `gather`, summing: partial gradients of a whole leaf into a shard's.

    Args:
        g: as `gather` returned it; zero in an empty place.
        dims: as there.
        own_layers: as there.
        all_layers: as there.
        num_layers: of the network.
        hand: all mesh axes by hand: each device there has a part of the sum.

    Returns:
        The gradient of the shard.
    """
    stacked = own_layers is not None
    left = [a for a in hand if not any(a in dim for dim in dims)]

    def in_place(g: jax.Array, layers: jax.Array | np.ndarray) -> jax.Array:
        return jnp.zeros((num_layers, *g.shape[1:]), g.dtype).at[layers].add(g)

    for i, dim in enumerate(dims):
        for axis in dim:
            if axis == AXIS and stacked:
                if i:
                    g = jax.lax.all_to_all(g, AXIS, split_axis=i, concat_axis=0, tiled=True)
                    g = in_place(g, np.maximum(all_layers.reshape(-1), 0))
            else:
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=i, tiled=True)
    if stacked and AXIS in left:
        g = in_place(g, jnp.maximum(own_layers, 0))
    return jax.lax.psum(g, tuple(left)) if left else g
