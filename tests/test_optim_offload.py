"""Moments in the host's memory: what is learnt is the same, and they are not on the device."""

from __future__ import annotations

import dataclasses
import re

import jax
import numpy as np
import pytest
from helpers import (
    OPTIMIZER,
    by_path,
    compile_step,
    largest_difference,
    program_of,
    put,
    put_state,
    random_batch,
    run_steps,
)

from spmd_train.checkpoint.checkpointer import Checkpointer
from spmd_train.config import CheckpointConfig, ConfigError, ShardingConfig
from spmd_train.parallel.replicas import CorruptStateError, ReplicaCheck
from spmd_train.plan.sizes import state_bytes


def memory_kinds(state) -> dict[str, str]:
    """Path to memory kind of everything but scalars."""
    return {
        path: leaf.sharding.memory_kind
        for path, leaf in by_path_of_arrays(state).items()
        if leaf.ndim
    }


def by_path_of_arrays(state) -> dict[str, jax.Array]:
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        ({"data": 2, "fsdp": 2}, {"ema_decay": 0.9}),
        ({"pipeline": 2, "fsdp": 2}, {}),
        ({"fsdp": 2, "tensor": 2}, {"name": "muon"}),
    ],
    ids=["adamw", "pipeline", "muon"],
)
def test_offload_learns_the_same(sizes: dict[str, int], changes: dict) -> None:
    optimizer = dataclasses.replace(OPTIMIZER, clip_norm=0.1, **changes)
    there = program_of(sizes, optimizer=optimizer)
    here = program_of(sizes, optimizer=dataclasses.replace(optimizer, offload="host"))
    batches = [random_batch("ragged", seed=s) for s in range(3)]
    first = jax.device_get(there.init(0))
    wanted, wanted_state = run_steps(there, batches, state=put_state(there, first))
    started = here.init(0)
    kinds = memory_kinds(started)
    assert kinds == {
        path: "pinned_host" if re.match(r"opt_state/.*/(mu|nu)/", path) else "device"
        for path in kinds
    }
    assert "pinned_host" in kinds.values()
    compiled, _ = compile_step(here)
    losses, state = run_steps(here, batches, state=started, step=compiled)
    assert memory_kinds(state) == kinds
    np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(wanted_state)
    assert largest_difference(state.params, by_path(wanted_state.params))[0] < 1e-6
    for path, array in by_path(state.opt_state).items():
        assert np.abs(array).max() > 0, path


def test_offload_leaves_the_state_of_a_bad_step() -> None:
    optimizer = dataclasses.replace(OPTIMIZER, offload="host")
    program = program_of({"fsdp": 2}, optimizer=optimizer, bad_step="skip")
    batch = put(program, random_batch())
    state, metrics = program.train_step(program.init(0), batch)
    assert not float(metrics["skipped"])
    before = by_path((state.params, state.opt_state))
    bad = {**batch, "weights": batch["weights"] * np.float32(np.nan)}
    state, metrics = program.train_step(state, bad)
    assert float(metrics["skipped"])
    after = by_path((state.params, state.opt_state))
    assert after.pop("1/schedule/count") == before["1/schedule/count"] + 1
    for path, array in after.items():
        np.testing.assert_array_equal(array, before[path], err_msg=path)


def test_offload_checkpoints_are_those_of_any_run(tmp_path) -> None:
    """The same bits there and back; a checkpoint knows no memory."""
    here, there = (
        program_of({"fsdp": 2}, optimizer=dataclasses.replace(OPTIMIZER, offload=offload))
        for offload in ("host", "none")
    )
    state, _ = here.train_step(here.init(0), put(here, random_batch()))
    wanted = by_path(state)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(asynchronous=False))
    checkpointer.save(1, state, {})
    for step, program in ((1, there), (2, here)):
        state = checkpointer.restore(step, program.abstract_state)
        planned = jax.tree.map(lambda s: s.sharding.memory_kind, program.abstract_state)
        assert jax.tree.map(lambda x: x.sharding.memory_kind, state) == planned
        for path, array in by_path(state).items():
            np.testing.assert_array_equal(array, wanted[path], err_msg=path, strict=True)
        checkpointer.save(step + 1, state, {})
    checkpointer.close()


def test_offload_copies_of_moments_are_compared() -> None:
    program = program_of(
        {"data": 2, "fsdp": 2}, optimizer=dataclasses.replace(OPTIMIZER, offload="host")
    )
    check = ReplicaCheck(program.abstract_state, hosts=["here"])
    state = program.init(0)
    check.check(0, state)
    moments = state.opt_state["precondition"].mu["embedding"]
    ((name, leaf),) = moments.items()
    parts = [np.array(shard.data) for shard in leaf.addressable_shards]
    parts[1].flat[0] += 1
    placed = [
        jax.device_put(part, shard.data.sharding)
        for part, shard in zip(parts, leaf.addressable_shards, strict=True)
    ]
    moments[name] = jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, placed)
    with pytest.raises(CorruptStateError, match="mu/embedding"):
        check.check(0, state)


def test_offload_counts_no_moments_on_the_device() -> None:
    there = state_bytes(program_of({"fsdp": 2}).plans)
    here = state_bytes(
        program_of({"fsdp": 2}, optimizer=dataclasses.replace(OPTIMIZER, offload="host")).plans
    )
    assert here.parameters == there.parameters
    assert here.host == 2 * here.parameters
    assert here.host + here.optimizer == there.optimizer
    assert here.optimizer < 100


def test_offload_refuses_layers_that_are_shared_out_in_two_ways() -> None:
    with pytest.raises(ConfigError, match=r"a device has 2 and .*mlp/up/kernel a device has 1"):
        program_of(
            {"fsdp": 2},
            optimizer=dataclasses.replace(OPTIMIZER, offload="host"),
            sharding=ShardingConfig(overrides={"blocks/mlp/up/kernel": "fsdp"}),
        )
