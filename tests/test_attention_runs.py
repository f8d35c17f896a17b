"""Which blocks of queries and keys a kernel of GPUs computes, against every pair of tokens."""

import numpy as np
import pytest

from spmd_train.nn.runs import Block, keys_met, queries_met, runs_of
from spmd_train.parallel.placement import Placement


@pytest.mark.parametrize("window", [0, 1, 5, 17])
@pytest.mark.parametrize("block", [Block(8, 4), Block(4, 8), Block(4, 4)])
def test_attention_runs_meet_where_some_pair_is_seen(block, window):
    size = 32
    some = 0
    for distance in range(-48, 49):
        away = distance + np.arange(block.queries)[:, None] - np.arange(size)
        seen = (away >= 0) & (away < (window or 1000))
        wanted = np.flatnonzero(seen.any(axis=0).reshape(-1, block.keys).any(axis=1))
        assert list(range(*keys_met(np.int32(distance), size, block, window))) == list(wanted)
        some += len(wanted)

        away = distance + np.arange(size)[:, None] - np.arange(block.keys)
        seen = (away >= 0) & (away < (window or 1000))
        wanted = np.flatnonzero(seen.any(axis=1).reshape(-1, block.queries).any(axis=1))
        assert list(range(*queries_met(np.int32(distance), size, block, window))) == list(wanted)
    assert some


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        # Two steps of a ring, then all keys: tokens of a run of queries and of keys.
        ("zigzag", [(256, 256), (256, 256), (256, 256)]),
        ("contiguous", [(512, 512), (512, 512), (512, 2048)]),
    ],
)
def test_attention_runs_are_as_long_as_a_placement_lets_them(name, lengths):
    placement = Placement(name=name, num_devices=4, length=2048, sizes=(128,))
    block = Block(128, 64)
    steps = [placement.ring()[0][1], placement.ring()[1][1], placement.gathered()]
    own, gathered = 2048 // 4, 2048
    for tiles, keys, (of_queries, of_keys) in zip(
        steps, (own, own, gathered), lengths, strict=True
    ):
        runs = runs_of([tiles], (block,), 0)
        assert runs.queries.shape == (4, 1, own // of_queries)
        assert runs.keys.shape == (4, 1, keys // of_keys)
        # The pairs of the tiles that meet, less what the diagonal hides.
        tiles_met = int(tiles.counts.max()) * tiles.size**2
        assert 0.6 * tiles_met < runs.met[0] <= tiles_met
