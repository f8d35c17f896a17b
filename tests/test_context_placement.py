"""Where the tokens of a split sequence are, and which tiles meet when: no device needed."""

import numpy as np
import pytest

from spmd_train.config import (
    ConfigError,
    ContextConfig,
    MeshConfig,
    ShardingConfig,
    default_config,
    parse,
)
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.placement import Placement, imbalance
from spmd_train.parallel.rules import Layout, make_rules
from spmd_train.parallel.sequence import check_heads, check_sequence


def placement_of(name, *, devices=4, length=128, window=0, tile=None):
    placement = Placement(name=name, num_devices=devices, length=length, window=window)
    if tile:
        # The tiles of a long sequence, on a short one.
        object.__setattr__(placement, "__class__", type("P", (Placement,), {"tile": tile}))
    return placement


def layout_of(*, method="ring", placement="zigzag", **mesh):
    config = MeshConfig(data=1, **mesh)
    rules = make_rules(ShardingConfig())
    return Layout(
        make_mesh(config), rules, context=ContextConfig(method=method, placement=placement)
    )


@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_context_placement_has_every_token_once(name):
    order = placement_of(name).order()
    assert sorted(order) == list(range(128))
    first = order[:32].tolist()
    expected = [*range(16), *range(112, 128)] if name == "zigzag" else list(range(32))
    assert first == expected


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_context_placement_zigzag_is_even_and_contiguous_is_not(devices):
    even = placement_of("zigzag", devices=devices, length=1024)
    assert imbalance(even.visible_pairs()) == 1.0
    assert len(set(even.gathered().counts)) == 1
    for step, tiles in even.ring():
        assert len(set(tiles.counts)) == 1, step
    skewed = placement_of("contiguous", devices=devices, length=1024)
    assert imbalance(skewed.visible_pairs()) == pytest.approx((2 * devices - 1) / devices, rel=0.01)
    assert sum(skewed.visible_pairs()) == sum(even.visible_pairs()) == 1024 * 1025 // 2


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize("name", ["zigzag", "contiguous"])
def test_context_placement_computes_every_visible_tile_once_and_no_other(name, window):
    placement = placement_of(name, window=window, tile=8)
    order = placement.order()
    distance = order[:, None] - order[None, :]
    seen = (distance >= 0) & ((distance < window) if window else True)
    tiles = seen.reshape(16, 8, 16, 8).any(axis=(1, 3))
    assert sum(placement.visible_pairs()) == seen.sum()
    own = 16 // 4
    ring = np.zeros_like(tiles, int)
    for step, met in placement.ring():
        for device in range(4):
            for i, j in met.pairs[device, : met.counts[device]]:
                ring[device * own + i, (device - step) % 4 * own + j] += 1
    gathered, whole = np.zeros_like(ring), np.zeros_like(ring)
    met = placement.gathered()
    for device in range(4):
        for i, j in met.pairs[device, : met.counts[device]]:
            gathered[device * own + i, j] += 1
    met = placement.whole()
    for i, j in met.pairs[0, : met.counts[0]]:
        whole[i, j] += 1
    np.testing.assert_array_equal(ring, tiles)
    np.testing.assert_array_equal(gathered, tiles)
    np.testing.assert_array_equal(whole, tiles)


def test_context_placement_window_leaves_out_ring_steps():
    steps = [s for s, _ in placement_of("contiguous", devices=8, length=256, window=32).ring()]
    assert steps == [0, 1]
    steps = [s for s, _ in placement_of("zigzag", devices=8, length=256, window=8).ring()]
    assert steps == [0, 1, 7]


def test_context_placement_tiles_divide_blocks_and_stay_few():
    for length in (8 * 512, 8 * 3000, 8 * 2**17):
        placement = placement_of("zigzag", length=length)
        assert placement.block_length % placement.tile == 0
        assert placement.block_length // placement.tile <= 32
        assert placement.tile >= 256


def test_context_config_is_possible_and_checked():
    config = default_config()
    config.mesh.context = 4
    config.context.method = "ulysses"
    assert parse(config).mesh.context == 4
    config.context.method = "rings"
    with pytest.raises(ConfigError, match=r"context\.method.*ring, all_gather, ulysses"):
        parse(config)


@pytest.mark.parametrize(
    "length, placement, near", [(100, "zigzag", "96 and 112"), (9, "contiguous", "8 and 16")]
)
def test_context_length_that_does_not_divide_is_an_error(length, placement, near):
    layout = layout_of(context=8, placement=placement)
    with pytest.raises(ConfigError, match=rf"sequence_length: {length} .* = 8 devices .*{near}"):
        check_sequence(length, layout)
    check_sequence(112, layout)


def test_context_heads_that_do_not_divide_are_an_error_for_ulysses_only():
    layout = layout_of(method="ulysses", context=4, tensor=2)
    check_heads(8, 8, layout)
    check_heads(16, 2, layout)
    with pytest.raises(ConfigError, match=r"num_heads: 12 heads over 2 .* = 4 .* 16; or use"):
        check_heads(12, 12, layout)
    with pytest.raises(ConfigError, match=r"num_kv_heads: 6 heads over 2 .* = 4 .* 8"):
        check_heads(24, 6, layout)
    check_heads(12, 12, layout_of(method="ring", context=4, tensor=2))
