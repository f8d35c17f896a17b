"""A resumed run is the uninterrupted run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import shutil
import signal
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import MODEL, by_path, largest_difference

from spmd_train import cluster, experiment, training
from spmd_train.checkpoint import Checkpointer
from spmd_train.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ObserveConfig,
    OptimizerConfig,
    TrainConfig,
)
from spmd_train.observe import Writers, read_jsonl
from spmd_train.parallel.replicas import ReplicaCheck
from spmd_train.train.preemption import PreemptedError

STEPS = 6


class CrashError(Exception):
    """Stands for whatever ends a run."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i in range(40):
        words = rng.integers(97, 123, (200, 5)).astype(np.uint8)
        (folder / f"{i}.txt").write_text(" ".join(bytes(w).decode() for w in words))
    return folder


def test_save_of_small_replicated_arrays_compiles_nothing(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = {f"{n}": jax.device_put(np.ones((8, n), np.float32), sharding) for n in range(1, 4)}
    compiled: list[str] = []

    def listen(event: str, _: float, **__: Any) -> None:
        compiled.extend([event] if event.endswith("backend_compile_duration") else [])

    jax.monitoring.register_event_duration_secs_listener(listen)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    try:
        checkpointer.save(1, state, {})
        checkpointer.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        checkpointer.close()
    assert checkpointer.steps() == [1] and not compiled


def config_of(text: pathlib.Path, **changes: Any) -> ExperimentConfig:
    base = ExperimentConfig(
        model=dataclasses.replace(MODEL, vocab_size=256),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(
            source="text",
            path=str(text / "*.txt"),
            sequence_length=32,
            eval_fraction=0.1,
            cache_dir=str(text / "cache"),
        ),
        optimizer=OptimizerConfig(ema_decay=0.9),
        train=TrainConfig(
            num_steps=STEPS, global_batch_size=8, log_every=1, eval_every=3, checkpoint_every=3
        ),
        checkpoint=CheckpointConfig(keep_last=10),
        observe=ObserveConfig(tensorboard=False),
    )
    return dataclasses.replace(base, **changes)


def restored(config: ExperimentConfig, workdir: pathlib.Path, step: int = STEPS) -> Any:
    checkpoints = Checkpointer(workdir, config.checkpoint, read_only=True)
    try:
        return checkpoints.restore(step, experiment.build(config).program.abstract_state)
    finally:
        checkpoints.close()


def losses(workdir: pathlib.Path) -> dict[tuple[str, int], float]:
    lines = read_jsonl(workdir / "metrics.jsonl")
    return {(line["split"], line["step"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def straight(text: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Six steps without a stop."""
    workdir = tmp_path_factory.mktemp("straight")
    training.train(config_of(text), workdir=workdir)
    return workdir


def run_until_crash(
    config: ExperimentConfig, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    write = Writers.write

    def fail(self: Writers, step: int, split: str, values: Any) -> None:
        if step == at:
            raise CrashError
        write(self, step, split, values)

    with monkeypatch.context() as patch:
        patch.setattr(Writers, "write", fail)
        with pytest.raises(CrashError):
            training.train(config, workdir=workdir)


def test_checkpoint_resume_is_bitwise_on_the_same_mesh(
    text: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = config_of(text)
    run_until_crash(config, tmp_path, monkeypatch, at=5)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]
    caplog.set_level("INFO", logger="spmd_train")
    training.train(config, workdir=tmp_path)
    assert "goes on from step 3" in caplog.text

    expected, got = by_path(restored(config, straight)), by_path(restored(config, tmp_path))
    assert any(path.startswith("ema/") for path in expected)
    assert any(path.startswith("opt_state/") for path in expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(got[path], array, err_msg=path, strict=True)
    assert losses(tmp_path) == losses(straight)
    assert set(losses(straight)) == {("train", s) for s in range(1, 7)} | {
        ("eval", 3),
        ("eval", 6),
    }


@pytest.mark.parametrize("at", [3, STEPS])
def test_checkpoint_resume_evaluates_what_was_saved_and_not_evaluated(
    text: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    """The process ends while it evaluates a step that it has saved: in the middle, at the end."""
    config = config_of(text)
    evaluate, evaluated = experiment.Experiment.evaluate, itertools.count(3, 3)

    def crash(*args: Any, **stop: Any) -> Any:
        if next(evaluated) == at:
            raise CrashError
        return evaluate(*args, **stop)

    with monkeypatch.context() as patch:
        patch.setattr(experiment.Experiment, "evaluate", crash)
        with pytest.raises(CrashError):
            training.train(config, workdir=tmp_path)
    assert ("eval", at) not in losses(tmp_path)
    training.train(config, workdir=tmp_path)
    assert losses(tmp_path) == losses(straight)


def test_checkpoint_resume_leaves_an_evaluation_when_told_to_stop(
    text: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Saved, though no save is due, and evaluated when it goes on."""
    config, num_batches = config_of(text), 0
    evaluate = experiment.evaluate

    def told(program: Any, params: Any, batches: Any, **stop: Any) -> Any:
        def noted() -> Any:
            nonlocal num_batches
            for batch in batches:
                num_batches += 1
                signal.raise_signal(signal.SIGTERM)
                yield batch

        return evaluate(program, params, noted(), **stop)

    before = signal.getsignal(signal.SIGTERM)
    seldom = dataclasses.replace(config.train, checkpoint_every=1000, check_replicas_every=1000)
    checked: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "evaluate", told)
        patch.setattr(ReplicaCheck, "check", lambda _, step, __: checked.append(step))
        try:
            with pytest.raises(PreemptedError, match="after step 3, saved"):
                training.train(dataclasses.replace(config, train=seldom), workdir=tmp_path)
        finally:
            signal.signal(signal.SIGTERM, before)
    assert checked == [3]
    assert num_batches == 1 < experiment.open_data(config, split="eval").num_sequences / 8
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3"]
    training.train(config, workdir=tmp_path)
    assert losses(tmp_path) == losses(straight)


def test_checkpoint_resume_of_damaged_ones_alone_is_refused(
    text: pathlib.Path, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    for step in ("3", "6"):
        next((workdir / "checkpoints" / step / "state" / "d").iterdir()).unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"all .* damaged \(3.bad-1, 6.bad-1\)"):
            training.train(config_of(text), workdir=workdir)
    assert losses(workdir) == losses(straight)


def test_checkpoint_resume_on_another_mesh_sees_the_same_batches(
    text: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(text)
    run_until_crash(config, tmp_path, monkeypatch, at=5)
    other = config_of(text, mesh=MeshConfig(data=1, fsdp=8))
    seen: list[list[int]] = []
    feed = experiment.Experiment.feed

    def record(self: Any, batches: Any) -> Any:
        def noted() -> Any:
            for batch in batches:
                seen.append(batch["example_id"].tolist())
                yield batch

        return feed(self, noted())

    monkeypatch.setattr(experiment.Experiment, "feed", record)
    training.train(other, workdir=tmp_path)

    data = experiment.open_data(config, split="train")
    expected = [data.batch(n, global_batch_size=8)["example_id"].tolist() for n in range(3, 6)]
    assert seen[:3] == expected
    got, wanted = losses(tmp_path), losses(straight)
    assert got.keys() == wanted.keys()
    for key, loss in wanted.items():
        assert got[key] == pytest.approx(loss, abs=2e-6), key
    difference = largest_difference(
        restored(other, tmp_path).params, restored(config, straight).params
    )
    assert difference[0] < 2e-5, difference


def test_checkpoint_of_a_finished_run_is_left_alone(
    text: pathlib.Path, straight: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    def files() -> dict[pathlib.Path, int]:
        paths = [p for p in straight.rglob("*") if p.is_file() and p.name != ".lock"]
        return {p: p.stat().st_mtime_ns for p in paths}

    before = files()
    caplog.set_level("INFO", logger="spmd_train")
    training.train(config_of(text), workdir=straight)
    assert "finished, 6 steps of 6" in caplog.text
    assert files() == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": dataclasses.replace(MODEL, vocab_size=256, embed_dim=64)}, "embedding/table"),
        ({"model": dataclasses.replace(MODEL, vocab_size=256, num_layers=4)}, "mlp/up/kernel"),
        ({"optimizer": OptimizerConfig(name="sgd", ema_decay=0.9)}, "opt_state"),
        ({"optimizer": OptimizerConfig()}, "ema/embedding/table: the config has none"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_whole(
    text: pathlib.Path, straight: pathlib.Path, changes: dict[str, Any], named: str
) -> None:
    before = (straight / "config.json").read_bytes(), losses(straight)
    train = dataclasses.replace(config_of(text).train, num_steps=STEPS + 1)
    config = config_of(text, **changes, train=train)
    with pytest.raises(ConfigError, match="does not fit the checkpoint of step 6") as error:
        training.train(config, workdir=straight)
    assert named in str(error.value)
    assert ((straight / "config.json").read_bytes(), losses(straight)) == before
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["3", "6"]


@pytest.mark.parametrize("leader", [True, False])
def test_wandb_is_needed_where_it_is_written_to(
    text: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, leader: bool
) -> None:
    def pass_on(*_: Any, **__: Any) -> None:
        raise CrashError

    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    monkeypatch.setattr(cluster, "is_leader", lambda: leader)
    monkeypatch.setattr(training, "make_folder", pass_on)
    config = config_of(text, observe=ObserveConfig(wandb_project="proj"))
    with pytest.raises(ConfigError if leader else CrashError):
        training.train(config, workdir=tmp_path / "run")


def test_checkpoint_folder_is_the_run_s_until_the_last_save_is_done(
    text: pathlib.Path, straight: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close, found = Checkpointer.close, []

    def look(self: Checkpointer) -> None:
        close(self)
        another = "import fcntl, sys; fcntl.flock(sys.stdin, fcntl.LOCK_EX | fcntl.LOCK_NB)"
        with (straight / ".lock").open("r+b") as lock:
            words = [sys.executable, "-c", another]
            done = subprocess.run(words, stdin=lock, capture_output=True)
        found.append(b"BlockingIOError" in done.stderr)

    monkeypatch.setattr(Checkpointer, "close", look)
    training.train(config_of(text), workdir=straight)
    assert found == [True]


def test_checkpoint_is_plain_orbax(text: pathlib.Path, straight: pathlib.Path) -> None:
    step = straight / "checkpoints" / str(STEPS)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        abstract = restored(config_of(text), straight)
        tree = reader.restore(
            step / "state",
            ocp.args.PyTreeRestore(
                restore_args={
                    "params": {"embedding": {"table": ocp.RestoreArgs(restore_type=np.ndarray)}}
                },
                item={"params": {"embedding": {"table": 0}}},
                partial_restore=True,
            ),
        )
    table = tree["params"]["embedding"]["table"]
    np.testing.assert_array_equal(table, np.asarray(abstract.params["embedding"]["table"]))
    meta = json.loads((step / "meta" / "metadata").read_text())
    facts = meta["data"].pop("facts")
    assert facts == experiment.open_data(config_of(text), split="train").facts
    assert meta["data"] == {"next_batch": STEPS, "global_batch_size": 8}
    assert meta["config"]["model"]["vocab_size"] == 256
    assert {"jax", "flax", "orbax-checkpoint", "spmd_train", "python"} <= meta["made_by"].keys()


def test_checkpoint_keeps_what_the_config_says(tmp_path: pathlib.Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_every=4, asynchronous=False)
    checkpoints = Checkpointer(tmp_path, config)
    for step in range(1, 8):
        checkpoints.save(step, {"x": np.full(3, step)}, {})
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 6, 7]


def test_checkpoint_evaluates_and_loads_on_another_mesh(
    text: pathlib.Path, straight: pathlib.Path
) -> None:
    config = config_of(text, mesh=MeshConfig(data=1, fsdp=4, tensor=2))
    built, params, step = experiment.load_params(config, workdir=straight)
    assert step == STEPS
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    values = built.evaluate(params, experiment.open_data(config, split="eval"))
    assert values["loss"] == pytest.approx(losses(straight)["eval", STEPS], abs=2e-6)
    with pytest.raises(ConfigError, match=r"--step=5: .* has checkpoints of steps \[3, 6\]"):
        experiment.load_params(config, workdir=straight, step=5)
