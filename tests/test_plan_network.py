"""Seconds on the network, by hand."""

import types

import numpy as np
import pytest
from jax.sharding import Mesh

from spmd_train.parallel.chips import CHIPS
from spmd_train.plan.network import Span, seconds_of, span_of
from spmd_train.plan.targets import parse_target

V5E, H100, V5P = CHIPS["v5e"], CHIPS["h100"], CHIPS["v5p"]
GB = 1e9


def mesh_of(target, **axes):
    """A mesh over made-up devices in the order of their coordinates."""
    devices = []
    for slice_ in range(target.num_slices):
        for place in np.ndindex(*target.shape):
            node = place[0] if target.platform == "gpu" else 0
            devices.append(
                types.SimpleNamespace(
                    platform=target.platform,
                    coords=(*place, 0)[:3],
                    slice_index=slice_,
                    process_index=node,
                )
            )
    grid = np.array(devices, dtype=object).reshape(tuple(axes.values()))
    return types.SimpleNamespace(devices=grid, shape=axes)


@pytest.mark.parametrize(
    "text, axes, span",
    [
        ("v5e:16x16", {"fsdp": 256}, Span(slices=1, inside=256, links=4)),
        ("v5e:16x16", {"data": 16, "fsdp": 16}, Span(slices=1, inside=16, links=2)),
        ("v5e:16x16", {"data": 32, "fsdp": 8}, Span(slices=1, inside=8, links=1)),
        ("v5e:4x4", {"fsdp": 16}, Span(slices=1, inside=16, links=2)),
        ("v5p:4x4x4", {"fsdp": 64}, Span(slices=1, inside=64, links=6)),
        ("2xv5p:4x4x4", {"fsdp": 128}, Span(slices=2, inside=64, links=6)),
        ("h100:4x8", {"fsdp": 32}, Span(slices=4, inside=8, links=0)),
        ("h100:4x8", {"data": 4, "fsdp": 8}, Span(slices=1, inside=8, links=0)),
    ],
)
def test_plan_network_finds_the_wires_of_an_axis(text, axes, span):
    target = parse_target(text)
    assert span_of(("fsdp",), mesh=mesh_of(target, **axes), target=target) == span


@pytest.mark.parametrize("text, links", [("2xv5e:4x4", 2), ("h100:4x8", 0)])
def test_plan_network_of_a_group_that_is_no_axis(text, links):
    target = parse_target(text)
    mesh = mesh_of(target, fsdp=32)
    span = span_of(("other",), mesh=mesh, target=target, group_size=8, slices=2)
    assert span == Span(slices=2, inside=4, links=links)


def test_plan_network_times_a_ring():
    span = Span(slices=1, inside=16, links=2)
    # Half of a v5e's four links: 100 GB/s; an all-reduce passes twice.
    ici, dcn = seconds_of("all-reduce", payload=GB, group_size=16, span=span, chip=V5E)
    assert (ici, dcn) == (pytest.approx(2 * 15 / 16 / 100), 0.0)
    ici, _ = seconds_of("all-gather", payload=GB, group_size=16, span=span, chip=V5E)
    assert ici == pytest.approx(15 / 16 / 100)


def test_plan_network_sends_each_devices_part_between_nodes():
    span = Span(slices=4, inside=8, links=0)
    ici, dcn = seconds_of("all-reduce", payload=GB, group_size=32, span=span, chip=H100)
    assert ici == pytest.approx(2 * 7 / 8 / 450)
    assert dcn == pytest.approx(2 * 3 / 4 / 8 / 50)


def test_plan_network_says_none_where_a_rate_is_not_known():
    span = Span(slices=2, inside=8, links=2)
    assert (
        seconds_of("all-gather", payload=GB, group_size=16, span=span, chip=CHIPS["v4"])[1] is None
    )
    assert (
        seconds_of("all-gather", payload=GB, group_size=2, span=span, chip=CHIPS["t4"])[0] is None
    )


def test_plan_network_one_device_sends_nothing():
    span = Span(slices=1, inside=1, links=2)
    assert seconds_of("all-reduce", payload=GB, group_size=1, span=span, chip=V5P) == (0.0, 0.0)


def test_plan_network_mesh_is_jaxs(monkeypatch):
    """The made-up meshes above have what a real one has."""
    import jax

    devices = np.array(jax.devices()).reshape(2, 4)
    mesh = Mesh(devices, ("data", "fsdp"))
    span = span_of(("fsdp",), mesh=mesh, target=parse_target("cpu:8"))
    assert span == Span(slices=1, inside=4, links=0)
