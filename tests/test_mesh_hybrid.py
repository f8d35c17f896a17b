"""Meshes over slices: which collectives of the compiled step cross the slow network.

The slices are made up: devices that say which one they are in, in an order that has neighbours in
different slices, as no hardware would have them.
"""

from __future__ import annotations

import types

import jax
import pytest
from helpers import LENGTH, MODEL, OPTIMIZER, TRAIN, compile_step
from jax.sharding import Mesh

from spmd_train.config import (
    ConfigError,
    ContextConfig,
    DcnMeshConfig,
    LossConfig,
    MeshConfig,
    ShardingConfig,
)
from spmd_train.inspect.collectives import count_collectives
from spmd_train.parallel import mesh as meshes
from spmd_train.tasks import LanguageModel
from spmd_train.train.program import make_program


@pytest.fixture
def sliced(monkeypatch):
    """Makes a mesh of a config over eight devices in two slices or nodes, and tells theirs."""

    def make(config, *, nodes=False):
        made_up = [
            types.SimpleNamespace(
                real=device,
                id=device.id,
                platform="cpu",
                device_kind="made up",
                process_index=i % 2 if nodes else 0,
                slice_index=0 if nodes else i % 2,
            )
            for i, device in enumerate(jax.devices())
        ]
        found = {}

        def mesh_of(grid, *args, **options):
            found["slices"] = meshes.slices_of(grid.flat)
            real = [device.real for device in grid.flat]
            grid = grid.copy()
            grid.flat = real
            return Mesh(grid, *args, **options)

        monkeypatch.setattr(meshes, "Mesh", mesh_of)
        return meshes.make_mesh(config, devices=made_up), found["slices"]

    return make


def crossings(mesh, slices):
    """Axes of the step's collectives, by the network that they take."""
    program = make_program(
        LanguageModel(model_config=MODEL, loss_config=LossConfig(), sequence_length=LENGTH),
        mesh=mesh,
        sharding=ShardingConfig(),
        optimizer=OPTIMIZER,
        train=TRAIN,
        context=ContextConfig(),
    )
    text = compile_step(program)[0].as_text()
    found = count_collectives(text, axis_sizes=mesh.shape, slices=slices)
    networks = {"ici": set(), "dcn": set()}
    for collective in found:
        networks[collective.network].update(collective.axes)
    return found, networks


@pytest.mark.parametrize(
    "between, within, nodes",
    [
        ({"data": 2}, {"data": 1, "fsdp": 2, "tensor": 2}, False),
        pytest.param({"fsdp": 2}, {"data": 2, "tensor": 2}, True, marks=pytest.mark.slow),
    ],
)
def test_mesh_hybrid_only_the_dcn_axis_crosses(sliced, between, within, nodes):
    mesh, slices = sliced(MeshConfig(dcn=DcnMeshConfig(**between), **within), nodes=nodes)
    found, networks = crossings(mesh, slices)
    (axis,) = between
    others = {name for name, size in within.items() if size > 1}
    assert others <= networks["ici"], "there is traffic to keep inside"
    crossing = [c for c in found if c.network == "dcn"]
    assert crossing and all(axis in c.axes for c in crossing)
    assert not any(axis in c.axes for c in found if c.network == "ici")
    alone = {c.axes for c in crossing if c.axes == (axis,)}
    assert alone, "gradients are summed over this axis by itself"
    # The tooth: as the devices were given, the innermost axis would cross.
    as_given = [i % 2 for i in range(mesh.size)]
    text_axes = {c.axes for c in found if c.network == "ici"}
    assert ("tensor",) in text_axes and slices != as_given


def test_mesh_hybrid_that_does_not_fit_the_slices_is_refused(sliced):
    with pytest.raises(ConfigError, match=r"mesh.dcn.data = 4: asks for 4 slices.* form 2; make"):
        sliced(MeshConfig(dcn=DcnMeshConfig(data=4), data=1, fsdp=2))
    one = MeshConfig(dcn=DcnMeshConfig(data=2), data=4)
    with pytest.raises(ConfigError, match=r"asks for 2 processes.* form 1; leave them 1"):
        meshes.make_mesh(one)


def test_mesh_rest_of_the_devices_is_told_what_the_others_take():
    with pytest.raises(ConfigError, match=r"the other axes \(tensor=3\) take 3 devices"):
        meshes.mesh_sizes(MeshConfig(data=-1, tensor=3), num_devices=8)
