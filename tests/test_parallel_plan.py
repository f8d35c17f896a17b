"""Where each parameter lives, why, and what is refused."""

from __future__ import annotations

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from helpers import MODEL, OPTIMIZER, SEQUENCE_SHARDED, param_shapes, program_of
from jax.sharding import PartitionSpec as P

from spmd_train import experiment
from spmd_train.config import (
    ConfigError,
    MeshConfig,
    ShardingConfig,
    load_config,
    parse,
)
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.plan import plan_params
from spmd_train.parallel.rules import make_rules

ALL2 = {"data": 2, "fsdp": 2, "tensor": 2}
CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def plan(mesh=ALL2, **kwargs):
    """Path to plan of a program."""
    return program_of(mesh, **kwargs).plans


def test_plan_gives_each_leaf_its_spec_and_reason() -> None:
    plans = plan()
    told = {path: (p.spec, p.reason) for path, p in plans.items() if path.startswith("params/")}
    norm = (P(), "rules: replicated")
    kv = (P(None, "fsdp", "tensor"), "rules embed->fsdp+context, kv_heads->tensor")
    query = (P(None, "fsdp", "tensor"), "rules embed->fsdp+context, heads->tensor")
    out = (P(None, "tensor", None, "fsdp"), "rules heads->tensor, embed->fsdp+context")
    up = (P(None, "fsdp", "tensor"), "rules embed->fsdp+context, mlp->tensor")
    down = (P(None, "tensor", "fsdp"), "rules mlp->tensor, embed->fsdp+context")
    assert told == {
        "params/embedding/table": (P("tensor", "fsdp"), "rules vocab->tensor, embed->fsdp+context"),
        "params/head/kernel": (P("fsdp", "tensor"), "rules embed->fsdp+context, vocab->tensor"),
        "params/final_norm/scale": norm,
        "params/blocks/attention_norm/scale": norm,
        "params/blocks/mlp_norm/scale": norm,
        "params/blocks/attention/query/kernel": query,
        "params/blocks/attention/key/kernel": kv,
        "params/blocks/attention/value/kernel": kv,
        "params/blocks/attention/out/kernel": out,
        "params/blocks/mlp/gate/kernel": up,
        "params/blocks/mlp/up/kernel": up,
        "params/blocks/mlp/down/kernel": down,
    }
    leaf = plans["params/blocks/mlp/up/kernel"]
    assert (leaf.shape, leaf.dtype) == ((2, 32, 64), "float32")
    assert (leaf.bytes, leaf.bytes_per_device) == (2 * 32 * 64 * 4, 2 * 32 * 64)


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon", "adafactor"])
def test_plan_of_moments_follows_the_parameter(name: str) -> None:
    model = dataclasses.replace(MODEL, embed_dim=128, mlp_dim=128, head_dim=16)
    optimizer = dataclasses.replace(OPTIMIZER, name=name, ema_decay=0.9)
    plans = plan(model=model, optimizer=optimizer)
    params = {path for path in plans if path.startswith("params/")}
    followed = set()
    for path, leaf in plans.items():
        if not leaf.shape or path in params or path == "step":
            continue
        param = next((p for p in params if path.endswith("/" + p.removeprefix("params/"))), None)
        if param is None:
            assert path.endswith("ns_coeffs") and leaf.spec == P(), path  # constants of Muon
            continue
        if leaf.shape == plans[param].shape:
            assert leaf.spec == plans[param].spec, path
            assert leaf.reason == f"follows {param}", path
            followed.add(param)
        elif len(leaf.shape) > 1:  # a factored moment has lost one dim
            assert leaf.reason.startswith("follows dims"), (path, leaf.reason)
    assert followed == params  # the average, at least


def test_plan_override_comes_before_the_rules() -> None:
    sharding = ShardingConfig(
        overrides={"blocks/mlp/(up|gate)/kernel": "none,data+fsdp", "head/.*": "none"}
    )
    plans = plan(sharding=sharding)
    up, gate = plans["params/blocks/mlp/up/kernel"], plans["params/blocks/mlp/gate/kernel"]
    assert up.spec == gate.spec == P(None, ("data", "fsdp"))
    assert up.reason == "override 'blocks/mlp/(up|gate)/kernel'"
    assert up.bytes_per_device * 4 == up.bytes
    assert plans["params/head/kernel"].spec == P()
    assert plans["params/blocks/mlp/down/kernel"].spec == P(None, "tensor", "fsdp")
    moment = next(p for path, p in plans.items() if path.endswith("mu/blocks/mlp/up/kernel"))
    assert moment.spec == up.spec


def test_plan_without_logical_axes_falls_back_to_fsdp() -> None:
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2, data=1))
    shapes = {"a": (6, 16, 8), "b": (6, 7), "c": (8, 8)}
    params = {k: jax.ShapeDtypeStruct(v, np.float32) for k, v in shapes.items()}
    rules = {"embed": ("fsdp",)}
    plans = plan_params(params, {}, rules=rules, overrides={}, mesh=mesh)
    assert {k: p.spec for k, p in plans.items()} == {"a": P(None, "fsdp"), "b": P(), "c": P("fsdp")}
    assert plans["a"].reason == "fsdp on the largest dim"
    assert plans["b"].reason == "replicated: nothing divides"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        pytest.param(
            {"mesh": {"tensor": 4}, "model": dataclasses.replace(MODEL, num_kv_heads=2)},
            ["attention/key/kernel", "size 2", "tensor = 4", "sharding.rules.kv_heads to none"],
            id="kv_heads",
        ),
        pytest.param(
            {"mesh": {"tensor": 8}, "model": dataclasses.replace(MODEL, num_heads=4)},
            ["attention/key/kernel (2, 32, 4, 4)", "size 4", "tensor = 8", "divides it is 4"],
            id="heads",
        ),
        pytest.param(
            {"mesh": {"fsdp": 8}, "model": dataclasses.replace(MODEL, embed_dim=36)},
            ["attention/key/kernel", "dim 1 of size 36", "fsdp = 8", "sharding.rules.embed"],
            id="embed",
        ),
        pytest.param(
            {"sharding": ShardingConfig(rules={"mlp": "fsdp"})},
            ["blocks/mlp/down/kernel", "dims 1 and 2", "'fsdp'"],
            id="two dims on one axis",
        ),
        pytest.param(
            {"sharding": ShardingConfig(overrides={"head/kernel": "tensor,tensor"})},
            ["head/kernel", "dims 0 and 1", "'tensor'"],
            id="two dims by override",
        ),
        pytest.param(
            {"sharding": ShardingConfig(overrides={"blocks/mpl/.*": "fsdp"})},
            ["blocks/mpl/.*", "match no parameter", "inspect shardings"],
            id="override that matches nothing",
        ),
        pytest.param(
            {"sharding": ShardingConfig(overrides={"final_norm/scale": "none,fsdp"})},
            ["final_norm/scale", "2 dims", "has 1"],
            id="override of too many dims",
        ),
        pytest.param(
            {
                "mesh": {"data": 8},
                "model": dataclasses.replace(MODEL, embed_dim=36),
                "sharding": ShardingConfig(overrides={"head/kernel": "data"}),
            },
            ["head/kernel", "dim 0 of size 36", "data = 8", "change the override"],
            id="override that does not divide",
        ),
        pytest.param(
            {"sharding": ShardingConfig(overrides={"head/kernel": "fspd"})},
            ["head/kernel", "'fspd'", "tensor"],
            id="unknown mesh axis in an override",
        ),
        pytest.param(
            {"sharding": ShardingConfig(rules={"vocab": "tensors"})},
            ["sharding.rules.vocab", "'tensors'", "fsdp"],
            id="unknown mesh axis in a rule",
        ),
        pytest.param(
            {"sharding": ShardingConfig(rules={"vocabulary": "tensor"})},
            ["sharding.rules.vocabulary", "vocab", "embed"],
            id="unknown logical axis",
        ),
        pytest.param(
            {"mesh": {"data": 8}, "global_batch_size": 12},
            ["train.global_batch_size: 12", "data = 8", "nearest that does is 16"],
            id="batch",
        ),
        pytest.param(
            {"mesh": {"data": 4}, "global_batch_size": 24, "grad_accumulation": 12},
            ["train.global_batch_size: 24", "12 microbatches", "data = 4", "48"],
            id="microbatch",
        ),
        pytest.param(
            {"mesh": {"tensor": 8}, "sharding": SEQUENCE_SHARDED, "length": 20},
            ["data.sequence_length: 20", "tensor = 8", "residual_sequence", "does is 16"],
            id="sequence",
        ),
    ],
)
def test_plan_refuses_what_cannot_be_before_anything_compiles(kwargs, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        program_of(**{"mesh": ALL2, **kwargs})
    for word in words:
        assert word in str(error.value), word


def test_mesh_gives_the_rest_of_the_devices_to_one_axis() -> None:
    assert make_mesh(MeshConfig()).shape["data"] == 8
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=2))
    assert {a: n for a, n in mesh.shape.items() if n > 1} == {"fsdp": 4, "tensor": 2}
    # tensor, the chattiest, is innermost.
    assert [d.id for d in mesh.devices.reshape(4, 2)[0]] == [0, 1]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MeshConfig(data=1, tensor=2), ["tensor=2 takes 2 devices", "there are 8", "-1"]),
        (MeshConfig(data=-1, tensor=3), ["mesh.data: -1", "tensor=3", "take 3", "the 8"]),
        (MeshConfig(data=1), ["every axis 1 takes 1 devices", "there are 8"]),
    ],
)
def test_mesh_refuses_sizes_that_do_not_fill_the_devices(
    config: MeshConfig, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        make_mesh(config)
    for word in words:
        assert word in str(error.value), word


def test_plan_of_70b_parameters_allocates_nothing() -> None:
    overrides = [("mesh.data", "1"), ("mesh.fsdp", "4"), ("mesh.tensor", "2")]
    config = parse(load_config(str(CONFIGS / "llama3_70b.py"), overrides))
    before = {id(a) for a in jax.live_arrays()}
    program = experiment.build(config).program
    assert not [a for a in jax.live_arrays() if id(a) not in before and a.size > 10**6]
    params = [p for path, p in program.plans.items() if path.startswith("params/")]
    assert sum(int(np.prod(p.shape)) for p in params) == pytest.approx(70.6e9, rel=1e-3)
    whole, mine = sum(p.bytes for p in params), sum(p.bytes_per_device for p in params)
    assert whole / mine == pytest.approx(8, rel=1e-3)  # all but norms is in 8 parts
    leaf = program.abstract_state.params["blocks"]["mlp"]["up"]["kernel"]
    assert leaf.sharding.shard_shape(leaf.shape) == (80, 8192 // 4, 28672 // 2)


def test_plan_knows_every_parameter_that_the_model_has() -> None:
    plans = plan()
    shapes = param_shapes(MODEL)
    assert {p.removeprefix("params/") for p in plans if p.startswith("params/")} == set(shapes)
    assert all(plans[f"params/{path}"].shape == leaf.shape for path, leaf in shapes.items())


def test_parallel_rules_misspelt_axis_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="the nearest is embed"):
        make_rules(ShardingConfig(rules={"embd": "fsdp"}))
