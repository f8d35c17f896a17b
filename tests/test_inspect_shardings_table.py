"""`inspect shardings`: every row is what a device then really holds, and nothing is allocated."""

import json
import math
import pathlib

import jax
import pytest

from spmd_train import experiment
from spmd_train.cli.inspect_shardings import format_table
from spmd_train.cli.main import main
from spmd_train.config import parse
from spmd_train.inspect.shardings import as_json, sharding_table
from spmd_train.parallel.rules import leaf_path

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
TINY = {
    "model": {"num_layers": 2, "embed_dim": 32, "num_heads": 4, "mlp_dim": 64},
    "data": {"sequence_length": 16},
    "train": {"global_batch_size": 8},
    "mesh": {"data": 1, "fsdp": 4, "tensor": 2},
}


def build(**sections):
    return experiment.build(parse(TINY | sections))


def test_inspect_shardings_rows_are_what_a_device_holds():
    # Adafactor's state has copies of parameters, of some of their dims, and scalars.
    program = build(optimizer={"name": "adafactor", "ema_decay": 0.99}).program
    answer = as_json(sharding_table(program.plans), mesh=program.mesh.shape)
    rows = {f"params/{row['path']}": row for row in answer["parameters"]}
    rows |= {row["path"]: row for row in answer["optimizer"]}
    leaves = jax.tree_util.tree_flatten_with_path(program.init(0))[0]
    assert {leaf_path(path) for path, _ in leaves} == set(rows)
    for path, array in leaves:
        row = rows[leaf_path(path)]
        shard = array.addressable_shards[0].data
        assert (row["shape"], row["dtype"]) == (list(array.shape), str(array.dtype))
        assert row["bytes"] == array.nbytes
        assert row["bytes_per_device"] == shard.nbytes
        cuts = [math.prod(program.mesh.shape[a] for a in axes) for axes in row["spec"]]
        assert [n // c for n, c in zip(row["shape"], cuts, strict=True)] == list(shard.shape)
    state = answer["totals"]["state"]
    assert state["bytes"] == sum(array.nbytes for _, array in leaves)
    assert state["bytes_per_device"] == sum(
        array.addressable_shards[0].data.nbytes for _, array in leaves
    )
    assert state["bytes_per_device"] < state["bytes"] / 6
    assert answer["num_devices"] == 8


def test_inspect_shardings_totals_add_up():
    table = sharding_table(build().program.plans)
    parts = [table.totals[name] for name in ("parameters", "optimizer")]
    whole = table.totals["state"]
    for field in ("num_arrays", "bytes", "bytes_per_device"):
        assert sum(getattr(part, field) for part in parts) == getattr(whole, field)
    assert table.totals["parameters"].bytes == 4 * table.num_params
    for field in ("num_arrays", "bytes", "bytes_per_device"):
        grouped = sum(getattr(group.total, field) for group in table.groups)
        assert grouped == getattr(table.totals["optimizer"], field)


def test_inspect_shardings_groups_copies_of_the_parameters():
    table = sharding_table(build(optimizer={"ema_decay": 0.9}).program.plans)
    groups = {group.path: group for group in table.groups}
    parameters = table.totals["parameters"]
    for path in ("opt_state/precondition/mu/*", "opt_state/precondition/nu/*", "ema/*"):
        assert groups[path].total == parameters
        assert groups[path].reason == "follows the parameter"
    assert groups["step"].reason.startswith("replicated")


def test_inspect_shardings_tells_every_reason():
    overrides = {"head/kernel": "none,fsdp"}
    table = sharding_table(build(sharding={"overrides": overrides}).program.plans)
    reasons = {plan.path: plan.reason for plan in table.params}
    assert "override" in reasons["head/kernel"]
    assert "embed->fsdp" in reasons["blocks/mlp/up/kernel"]
    lines = list(format_table(table, mesh={"fsdp": 4, "tensor": 2, "data": 1}))
    assert lines[0] == "mesh: fsdp=4 x tensor=2"
    (head,) = [line for line in lines if line.startswith("head/kernel")]
    assert head.split() == [
        *("head/kernel", "[32,256]", "float32", "(-,", "fsdp)", "8.00", "KiB"),
        *("override", "'head/kernel'"),
    ]
    for plan in table.params:
        assert any(line.startswith(plan.path + " ") and plan.reason in line for line in lines)


def test_inspect_shardings_of_70b_allocates_and_compiles_nothing(capsys):
    held = {id(array) for array in jax.live_arrays()}
    events = []

    def listen(name, *_, **__):
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        code = main(["inspect", "shardings", f"--config={CONFIGS / 'llama3_70b.py'}", "--json"])
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    answer = json.loads(capsys.readouterr().out)
    assert code == 0
    assert answer["num_parameters"] == 70_553_706_496
    # float32 parameters and two moments, over the 8 devices of these tests.
    state = answer["totals"]["state"]
    assert state["bytes"] == pytest.approx(3 * 4 * 70_553_706_496, rel=1e-6)
    assert state["bytes_per_device"] == pytest.approx(state["bytes"] / 8, rel=1e-3)
    assert not [name for name in events if "backend_compile" in name]
    assert sum(a.nbytes for a in jax.live_arrays() if id(a) not in held) < 2**20
