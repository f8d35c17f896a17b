"""Which device holds which tokens of a sequence, and which of its queries meet which keys when.

A sequence over C devices is cut into blocks: C of them, one a device (`contiguous`), or 2C, of
which device i holds i and 2C-1-i (`zigzag`: under a causal mask every device then has the same
work). Blocks are cut into tiles, the pairs of which are computed one at a time. All of this is
decided in Python, before anything is traced: a tile of keys that no query of a tile may see costs
nothing.

"Distance" below is between places in the sequence. Within a segment it is also the difference of
two tokens' positions, so what a window excludes by distance it excludes by position.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

TILE = 512
"""Tokens of a tile, about."""
MAX_TILES = 32
"""Tiles of a block at most, so that the tables stay small however long the sequence is."""

_BLOCKS_PER_DEVICE = {"contiguous": 1, "zigzag": 2}


def blocks_per_device(placement: str) -> int:
    """How many blocks of the sequence a device holds."""
    return _BLOCKS_PER_DEVICE[placement]


def blocks_of(placement: str, *, num_devices: int) -> list[tuple[int, ...]]:
    """The blocks that each device holds, in the order in which it holds them."""
    if placement == "contiguous":
        return [(i,) for i in range(num_devices)]
    return [(i, 2 * num_devices - 1 - i) for i in range(num_devices)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """Which tiles of queries meet which tiles of keys.

    Attributes:
        pairs: int32 [C, N, 2], for each device: tile of its queries, tile of the keys it has.
        counts: int32 [C], how many of the N are a device's; the rest is padding.
        size: tokens of a tile.
        queries: int [C, I], which tile of the sequence each tile of a device's queries is.
        keys: int [C, J], the same of the keys it has.
    """

    pairs: np.ndarray
    counts: np.ndarray
    size: int
    queries: np.ndarray
    keys: np.ndarray


def mine(table: np.ndarray, axes: Sequence[str]) -> jax.Array:
    """This device's row of a table [C, ...], inside a `shard_map` over `axes`."""
    here = 0 if (table == table[:1]).all() else jax.lax.axis_index(tuple(axes))
    return jnp.asarray(table)[here]


class RingStep(NamedTuple):
    """One or several steps of a ring that are alike.

    Attributes:
        tiles: of each; device i meets the keys of device i - s at step s.
        distance_in: by how many devices keys came since the step before.
        distance_out: by how many they go on to the next; 0: this is the last step.
    """

    tiles: list[Tiles]
    distance_in: int
    distance_out: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A sequence on the devices that share it.

    Attributes:
        name: `contiguous` or `zigzag`.
        num_devices: C.
        length: tokens of the whole sequence; divides into the blocks.
        window: of sliding-window attention; 0: none.
        sizes: tokens that a tile may have, the best first; none: any number.
    """

    name: str
    num_devices: int
    length: int
    window: int = 0
    sizes: tuple[int, ...] = ()

    @property
    def blocks(self) -> list[tuple[int, ...]]:
        """The blocks of each device."""
        return blocks_of(self.name, num_devices=self.num_devices)

    @property
    def block_length(self) -> int:
        """Tokens of a block."""
        return self.length // (self.num_devices * blocks_per_device(self.name))

    @property
    def tile(self) -> int:
        """Tokens of a tile: the first of `sizes` that divides a block, else what is near `TILE`."""
        block = self.block_length
        for size in self.sizes:
            if block % size == 0:
                return size
        wanted = max(TILE, block / MAX_TILES)
        if block <= wanted:
            return block
        divisors = [d for d in range(1, block + 1) if block % d == 0]
        return min(divisors, key=lambda d: abs(math.log(d / wanted)))

    def order(self) -> np.ndarray:
        """Int64 [T]: which token of the sequence lies at each place, device after device."""
        block = self.block_length
        starts = [b * block for blocks in self.blocks for b in blocks]
        return np.concatenate([np.arange(s, s + block) for s in starts])

    def ring(self) -> list[tuple[int, Tiles]]:
        """The steps of a ring at which some device has work.

        Returns:
            (s, tiles): device i meets the keys of device i - s. The first is 0: its own.
        """
        steps = []
        for s in range(self.num_devices):
            held = [self.blocks[i - s] for i in range(self.num_devices)]
            tiles = self._tiles(self.blocks, held)
            if tiles.counts.any():
                steps.append((s, tiles))
        return steps

    def grouped_ring(self) -> list[RingStep]:
        """The steps of `ring`: the first and the last alone, between them alike ones together."""
        steps = self.ring()
        places = [s for s, _ in steps]
        distances = [b - a for a, b in pairwise(places)]
        groups: list[RingStep] = []
        for i, (_, tiles) in enumerate(steps):
            step = RingStep([tiles], ([0, *distances])[i], ([*distances, 0])[i])
            if i > 1 and step[1:] == groups[-1][1:] and len(groups) > 1:
                groups[-1].tiles.append(tiles)
            else:
                groups.append(step)
        return groups

    def gathered(self) -> Tiles:
        """Every device's queries against the keys of all, device after device."""
        everything = tuple(b for blocks in self.blocks for b in blocks)
        return self._tiles(self.blocks, [everything] * self.num_devices)

    def whole(self) -> Tiles:
        """All queries against all keys, both device after device: the same on every device."""
        everything = tuple(b for blocks in self.blocks for b in blocks)
        return self._tiles([everything], [everything])

    def _tiles(self, queries: Sequence[Sequence[int]], keys: Sequence[Sequence[int]]) -> Tiles:
        places, key_places = (np.stack([self._places(b) for b in held]) for held in (queries, keys))
        lists = [self._pairs(q, k) for q, k in zip(places, key_places, strict=True)]
        counts = np.array([len(pairs) for pairs in lists], np.int32)
        table = np.zeros((len(lists), max(1, counts.max()), 2), np.int32)
        for row, pairs in zip(table, lists, strict=True):
            row[: len(pairs)] = pairs
        return Tiles(pairs=table, counts=counts, size=self.tile, queries=places, keys=key_places)

    def _places(self, blocks: Sequence[int]) -> np.ndarray:
        """Which tiles of the sequence these blocks are."""
        per_block = self.block_length // self.tile
        return np.concatenate([np.arange(b * per_block, (b + 1) * per_block) for b in blocks])

    def _pairs(self, queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """Int [N, 2]: the pairs of tiles in which some query sees some key, by queries, by keys."""
        tiles = queries[:, None] - keys
        nearest = (tiles - 1) * self.tile + 1
        return np.argwhere((tiles >= 0) & (nearest < (self.window or math.inf)))

    def visible_pairs(self) -> list[int]:
        """Query-key pairs of each device, for a sequence that is one document."""

        def before(end: int) -> int:
            """Pairs of the queries [0, end): query t sees min(t + 1, window) keys."""
            window = min(self.window or end, end)
            return window * (window + 1) // 2 + (end - window) * window

        block = self.block_length
        return [
            sum(before((b + 1) * block) - before(b * block) for b in blocks)
            for blocks in self.blocks
        ]


def imbalance(work: Sequence[int]) -> float:
    """The largest share over the mean: 1.0 where all have the same."""
    return max(work) * len(work) / sum(work)
