"""Which blocks of queries and keys meet, where each side is a few runs of a sequence.

A run is tokens that follow each other in the sequence: all of it, or a block of
`context.placement`. "Distance" is between places in the sequence, of a query after a key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from spmd_train.parallel.placement import Tiles

_ANY = 2**30
"""A window that hides nothing."""


class Block(NamedTuple):
    """Queries and keys that a program of a kernel takes at one time; powers of two."""

    queries: int
    keys: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Runs:
    """Where in the sequence a device's runs start, all of a side equally long.

    Attributes:
        queries: int32 [N], or before a device's are taken [C, L, N] for L steps of C devices.
        keys: int32 [M].
        met: for each of `blocks` the pairs of a query and a key in blocks that meet, on the device
            and in the step that have most.
    """

    queries: Any
    keys: Any
    met: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def runs_of(steps: Sequence[Tiles], blocks: Sequence[Block], window: int) -> Runs:
    """The runs of each device in each step."""
    queries, q_size = _runs([tiles.queries for tiles in steps], steps[0].size)
    keys, k_size = _runs([tiles.keys for tiles in steps], steps[0].size)
    met = []
    for block in blocks:
        firsts = queries[..., None] + np.arange(0, q_size, block.queries)
        distances = firsts.reshape(*queries.shape[:2], -1, 1) - keys[:, :, None]
        first, end = keys_met(distances, k_size, block, window)
        most = int((end - first).clip(0).sum(axis=(2, 3)).max())
        met.append(most * block.queries * block.keys)
    return Runs(queries, keys, tuple(met))


def _runs(steps: Sequence[np.ndarray], size: int) -> tuple[np.ndarray, int]:
    """Of tiles [C, I] in each step: starts [C, L, N], and how long a run is."""
    places = np.stack(steps, axis=1)
    cuts = 1 + np.flatnonzero((np.diff(places) != 1).any(axis=(0, 1)))
    tiles = int(np.gcd.reduce([*cuts, places.shape[2]]))
    return (places[:, :, ::tiles] * size).astype(np.int32), tiles * size


def keys_met(distance: Any, size: int, block: Block, window: int) -> tuple[Any, Any]:
    """Which blocks of a run of `size` keys some query of a block sees.

    Args:
        distance: int32 (numpy, or JAX's in a kernel), of the first query from the run's first key.
        size: tokens of the run.
        block: how many queries and keys each.
        window: 0: off.

    Returns:
        (first, end), of none if `end` is not above `first`.
    """
    first = _floor(distance + 1 - (window or _ANY), block.keys)
    end = 1 + _floor(distance + block.queries - 1, block.keys)
    return first.clip(0, size // block.keys), end.clip(0, size // block.keys)


def queries_met(distance: Any, size: int, block: Block, window: int) -> tuple[Any, Any]:
    """Which blocks of a run of `size` queries see some key of a block.

    Args:
        distance: int32 in a kernel, of the run's first query from the first key.
        size: tokens of the run.
        block: how many queries and keys each.
        window: 0: off.

    Returns:
        (first, end), of none if `end` is not above `first`.
    """
    first = _floor(-distance, block.queries)
    end = 1 + _floor((window or _ANY) + block.keys - 2 - distance, block.queries)
    return first.clip(0, size // block.queries), end.clip(0, size // block.queries)


def _floor(x: Any, divisor: int) -> Any:
    """`x // divisor` by a power of two: a shift, which Triton does to negative numbers too."""
    return x >> (divisor.bit_length() - 1)
