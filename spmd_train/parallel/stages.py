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

Where `pipeline` shares a dim with an axis that is not by hand, that all-to-all comes before the
tick loop, in a `shard_map` of its own over all axes of the leaf (`to_stages`); the loop then finds
the leaf by stage, on its first dim.
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
        sizes: layers of each virtual stage.
    """

    num_layers: int
    num_devices: int
    num_chunks: int
    sizes: tuple[int, ...]

    @property
    def is_even(self) -> bool:
        """Whether all virtual stages have as many layers."""
        return len(set(self.sizes)) == 1

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


def loads(sizes: Sequence[int], *, head_layers: float) -> list[float]:
    """Work of each virtual stage per microbatch, in forward passes of a layer.

    A layer costs four (forward, again in B, twice for gradients); the last virtual stage's F is
    saved, and it has the head, at three of its forward passes. The embedding is a look-up: no
    matmul in any stage.

    Args:
        sizes: layers of each.
        head_layers: FLOPs of the head's forward pass, in those of a layer's.
    """
    return [4.0 * n for n in sizes[:-1]] + [3.0 * sizes[-1] + 3.0 * head_layers]


def _even(num_layers: int, count: int) -> tuple[int, ...]:
    """As many layers in each of some stages; the last ones have fewer: the head is there, too."""
    each, more = divmod(num_layers, count)
    return tuple(each + (k < more) for k in range(count))


def make_stages(
    num_layers: int,
    *,
    num_devices: int,
    num_chunks: int,
    balance: str = "layers",
    head_layers: float = 0.0,
) -> Stages:
    """Divides the layers.

    Args:
        num_layers: of the network; each virtual stage gets one at least.
        num_devices: P.
        num_chunks: V.
        balance: `layers`: as many layers in each; `flops`: the stage with the most work has as
            little as can be, by `loads`.
        head_layers: as in `loads`.

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
    sizes = _even(num_layers, count)
    if balance == "flops" and count > 1:
        # The even division is tried first, so that it stays where nothing is better.
        tried = [(*_even(num_layers - n, count - 1), n) for n in range(1, num_layers - count + 2)]
        sizes = min([sizes, *tried], key=lambda sizes: max(loads(sizes, head_layers=head_layers)))
    return Stages(num_layers, num_devices, num_chunks, sizes)


Dims = Sequence[tuple[str, ...]]
"""Mesh axes of each dim of a leaf."""


def by_hand(dims: Dims, hand: Collection[str]) -> Dims:
    """Only the mesh axes that a `shard_map` takes."""
    return [tuple(a for a in dim if a in hand) for dim in dims]


def to_stages(w: jax.Array, dim: int, *, all_layers: np.ndarray) -> jax.Array:
    """A part of all layers becomes this device's layers: inside a `shard_map` over `pipeline`.

    Args:
        w: [layers, ...]; `pipeline` splits `dim`, as the innermost of its mesh axes.
        dim: not the first.
        all_layers: as in `gather`.

    Returns:
        [V N, ...], whole in `dim` as far as `pipeline` goes.
    """
    w = w[np.maximum(all_layers.reshape(-1), 0)]
    return jax.lax.all_to_all(w, AXIS, split_axis=0, concat_axis=dim, tiled=True)


def from_stages(g: jax.Array, dim: int, *, all_layers: np.ndarray, num_layers: int) -> jax.Array:
    """`to_stages` undone; what is in an empty place must be zero."""
    g = jax.lax.all_to_all(g, AXIS, split_axis=dim, concat_axis=0, tiled=True)
    return _in_place(g, np.maximum(all_layers.reshape(-1), 0), num_layers=num_layers)


def _in_place(g: jax.Array, layers: jax.Array | np.ndarray, *, num_layers: int) -> jax.Array:
    return jnp.zeros((num_layers, *g.shape[1:]), g.dtype).at[layers].add(g)


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
                    w = to_stages(w, i, all_layers=all_layers)
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
    for i, dim in enumerate(dims):
        for axis in dim:
            if axis == AXIS and stacked:
                if i:
                    g = from_stages(g, i, all_layers=all_layers, num_layers=num_layers)
            else:
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=i, tiled=True)
    if stacked and AXIS in left:
        g = _in_place(g, jnp.maximum(own_layers, 0), num_layers=num_layers)
    return jax.lax.psum(g, tuple(left)) if left else g
