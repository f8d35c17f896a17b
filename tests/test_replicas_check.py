"""Silent corruption: a copy of the state that is no longer one is found, and named."""

from __future__ import annotations

import dataclasses
import os
import re
import threading

import fault_helpers as faults
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import program_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train import running, training
from spmd_train.checkpoint import steps
from spmd_train.cli.main import main
from spmd_train.config import load_config, parse
from spmd_train.parallel.replicas import CorruptStateError, ReplicaCheck

HOSTS = ["host-a"]


@pytest.fixture(scope="module")
def trained():
    """A state on data2 x fsdp2 x tensor2, of numbers that nothing is compiled for."""
    state = program_of({"data": 2, "fsdp": 2, "tensor": 2}).abstract_state
    rng = np.random.default_rng(0)
    made = jax.tree.map(
        lambda leaf: jax.device_put(
            (100 * rng.normal(size=leaf.shape)).astype(leaf.dtype), leaf.sharding
        ),
        state,
    )
    return ReplicaCheck(state, hosts=HOSTS), made


def with_flip(array, *, device, bit, at=0):
    """A global array of which one device's copy has one bit turned."""
    parts = []
    for shard in array.addressable_shards:
        data = np.array(shard.data)
        if shard.device == device:
            data.reshape(-1).view(np.uint8)[at * data.itemsize + bit // 8] ^= 1 << bit % 8
        parts.append(jax.device_put(data, shard.device))
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)


def corrupt(state, path, **where):
    """The state with a flip in the parameter `path`, a tuple of keys."""

    def change(tree, keys):
        if not keys:
            return with_flip(tree, **where)
        return {**tree, keys[0]: change(tree[keys[0]], keys[1:])}

    return dataclasses.replace(state, params=change(state.params, path))


def test_replicas_that_agree_pass(trained):
    check, state = trained
    assert check.needed
    check.check(3, state)


def test_replicas_are_compiled_for_in_the_background(trained):
    _, state = trained
    check = ReplicaCheck(program_of({"data": 2, "fsdp": 2, "tensor": 2}).abstract_state, hosts=[])
    compiled = []

    def listen(event, _, **__):
        if event.endswith("backend_compile_duration"):
            compiled.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        check.prepare()
        check.prepare()
        check.check(3, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1 and compiled[0].startswith("replica-check"), compiled


@pytest.mark.parametrize("bit, at", [(0, 0), (31, 0), (17, 100)])
def test_replicas_one_flipped_bit_is_found(trained, bit, at):
    """An embedding table in four shards, each there twice: of two none can be called right."""
    check, state = trained
    device = jax.devices()[3]
    bad = corrupt(state, ("embedding", "table"), device=device, bit=bit, at=at)
    with pytest.raises(CorruptStateError) as told:
        check.check(40, bad)
    found = re.findall(r"^  (\S+) of process 0 on host-a: (.*)$", str(told.value), re.MULTILINE)
    assert "step 40" in str(told.value)
    assert str(device) in [name for name, _ in found] and len(found) == 2
    assert {leaves for _, leaves in found} == {"params/embedding/table"}


def test_replicas_the_one_that_most_outvote_is_named(trained):
    """Norm scales are on all eight devices."""
    check, state = trained
    device = jax.devices()[5]
    bad = corrupt(state, ("final_norm", "scale"), device=device, bit=9)
    with pytest.raises(CorruptStateError) as told:
        check.check(1, bad)
    found = re.findall(r"^  (\S+) of process", str(told.value), re.MULTILINE)
    assert found == [str(device)]


def test_replicas_check_takes_a_layer_s_memory():
    """A first check that took as much memory as the state has cost half a second of page faults."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    leaf = jax.ShapeDtypeStruct((32, 64, 256), jnp.float32, sharding=NamedSharding(mesh, P()))
    program = ReplicaCheck({"kernel": leaf}, hosts=HOSTS)._compile(["kernel"])
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes == 32 * 64 * 256 * 4
    assert memory.temp_size_in_bytes < 4 * 64 * 256 * 4


def test_replicas_without_copies_need_no_check():
    check = ReplicaCheck(program_of({}).abstract_state, hosts=HOSTS)
    assert not check.needed
    check.check(1, None)


def test_replicas_bad_state_ends_the_run_unsaved(tmp_path, monkeypatch, caplog):
    """The check comes before each save, and passes where nothing was done to the state."""
    words = faults.command(
        tmp_path / "run",
        devices=0,
        train__num_steps=12,
        train__checkpoint_every=4,
        mesh__fsdp=2,
        mesh__tensor=2,
    )
    real = running.Run._paused

    def paused(self, step, state):
        if step == 8:
            state = corrupt(state, ("final_norm", "scale"), device=jax.devices()[2], bit=3)
        real(self, step, state)

    monkeypatch.setattr(running.Run, "_paused", paused)
    assert main(words) == 1
    assert str(jax.devices()[2]) in caplog.text and "silent corruption" in caplog.text
    assert steps.committed_steps(tmp_path / "run" / "checkpoints") == [4]
    monkeypatch.undo()
    pairs = [w.removeprefix("--config.").split("=", 1) for w in words if w.startswith("--config.")]
    config = parse(load_config(str(faults.ROOT / "configs" / "lm_tiny.py"), pairs))
    training.train(config, workdir=tmp_path / "run")
    assert steps.committed_steps(tmp_path / "run" / "checkpoints") == [8, 12]


# One bit of the last local device's copy, just before the second save.
CORRUPT = """
import dataclasses, jax, numpy as np
from spmd_train.running import Run
paused = Run._paused
def corrupted(self, step, state):
    if step == 8:
        scale = state.params["final_norm"]["scale"]
        parts = [np.array(shard.data) for shard in scale.addressable_shards]
        parts[-1].view(np.uint32)[3] ^= 1
        parts = [jax.device_put(p, s.device) for p, s in zip(parts, scale.addressable_shards)]
        bad = jax.make_array_from_single_device_arrays(scale.shape, scale.sharding, parts)
        params = {**state.params, "final_norm": {"scale": bad}}
        state = dataclasses.replace(state, params=params)
    paused(self, step, state)
Run._paused = corrupted
"""


@pytest.mark.slow
def test_replicas_host_is_named(tmp_path):
    """Two real processes, of which the second's device goes wrong: both say so, and stop."""
    words = faults.command(tmp_path / "run", train__num_steps=12, train__checkpoint_every=4)
    codes, logs = faults.run_together(words, folder=tmp_path, prelude={1: CORRUPT})
    assert codes == [1, 1], logs
    for log in logs:
        found = re.findall(r"^  (\S+) of process (\d) on (\S+): (.*)$", log, re.MULTILINE)
        ((_, process, host, leaf),) = found
        assert (process, host, leaf) == ("1", os.uname().nodename, "params/final_norm/scale")
        assert "step 8" in log and "Traceback" not in log
    assert steps.committed_steps(tmp_path / "run" / "checkpoints") == [4]
