"""Poisoned batches: skipped, rolled back from, or stopped at; never saved."""

from __future__ import annotations

import contextlib
import json
import math
import signal

import fault_helpers as faults
import numpy as np
import pytest
from helpers import by_path, program_of, put, random_batch

from spmd_train import training
from spmd_train.checkpoint import steps
from spmd_train.cli.main import main
from spmd_train.config import (
    ConfigError,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
    load_config,
    parse,
)
from spmd_train.data import Dataset
from spmd_train.observe import read_examples, read_jsonl
from spmd_train.train.bad_numbers import BadStepError, NumbersWatch, Rollbacks, read_bundle
from spmd_train.train.preemption import PreemptedError

POISONED = 12


@pytest.fixture
def poison(monkeypatch):
    """Batch 12 has a weight that is no number; called, it heals."""
    batch = Dataset.batch

    def poisoned(self, step, **options):
        made = batch(self, step, **options)
        if step == POISONED:
            made["weights"][0, 3] = np.nan
        return made

    monkeypatch.setattr(Dataset, "batch", poisoned)
    return monkeypatch.undo


def config(workdir, **changes):
    words = faults.command(workdir, train__num_steps=20, **changes)
    pairs = [w.removeprefix("--config.").split("=", 1) for w in words if w.startswith("--config.")]
    path = str(faults.ROOT / "configs" / "lm_tiny.py")
    return parse(load_config(path, [(key, value) for key, value in pairs]))


def test_bad_numbers_skip_leaves_the_state():
    program = program_of({"data": 2}, bad_step="skip")
    state = program.init(0)
    before = by_path(state)
    batch = random_batch()
    batch["weights"][0, 3] = np.nan
    state, metrics = program.train_step(state, put(program, batch))
    after = by_path(state)
    assert metrics["skipped"] == 1 and math.isnan(metrics["loss_sum"])
    for counted in ("step", "opt_state/schedule/count"):
        assert after.pop(counted) == before.pop(counted) + 1
    for path, value in before.items():
        assert value.tobytes() == after[path].tobytes(), path
    state, metrics = program.train_step(state, put(program, random_batch()))
    assert metrics["skipped"] == 0
    assert (by_path(state)["params/embedding/table"] != after["params/embedding/table"]).any()


def test_bad_numbers_skip_takes_the_learning_rate_along():
    """What is logged is what was applied, also after steps that were skipped."""
    schedule = ScheduleConfig(name="linear", warmup_steps=10)
    sgd = OptimizerConfig(name="sgd", b1=0.0, clip_norm=0.0, weight_decay=0.0, schedule=schedule)
    program = program_of({}, bad_step="skip", optimizer=sgd, num_steps=100)
    state = program.init(0)
    for step in range(4):
        batch = random_batch(seed=step)
        if step in (1, 2):
            batch["weights"][0, 3] = np.nan
        before = by_path(state.params)
        state, metrics = program.train_step(state, put(program, batch))
    moved = math.sqrt(sum(np.sum((x - before[k]) ** 2) for k, x in by_path(state.params).items()))
    applied = moved / float(metrics["grad_norm"])
    assert applied == pytest.approx(float(metrics["learning_rate"]), rel=1e-3)


def test_bad_numbers_skip_goes_on(tmp_path, poison):
    workdir = tmp_path / "run"
    training.train(config(workdir, train__bad_step="skip"), workdir=workdir)
    lines = read_jsonl(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if line["skipped"]] == [POISONED + 1]
    assert math.isfinite(lines[-1]["loss"])


def test_bad_numbers_rollback_leaves_the_data_out(tmp_path, poison):
    workdir = tmp_path / "run"
    changes = {"train__bad_step": "rollback", "train__log_examples": "true"}
    training.train(config(workdir, **changes), workdir=workdir)
    (line,) = (workdir / "rollbacks.jsonl").read_text().splitlines()
    assert json.loads(line).items() >= {"step": 10, "skip": 3, "bad_step": 13}.items()
    losses = [line["loss"] for line in read_jsonl(workdir / "metrics.jsonl")]
    assert len(losses) == 20 and all(map(math.isfinite, losses))
    assert sorted(read_examples(workdir)) == list(range(23))
    # The run goes on where its data is, also from the checkpoint before the rollback's.
    for bad in (None, 20):
        if bad is not None:
            steps.quarantine(workdir / "checkpoints", 30)
            steps.quarantine(workdir / "checkpoints", bad)
        longer = config(workdir, **changes, checkpoint__keep_last=9)
        longer = type(longer)(
            **{**vars(longer), "train": TrainConfig(**{**vars(longer.train), "num_steps": 30})}
        )
        training.train(longer, workdir=workdir)
        assert sorted(read_examples(workdir)) == list(range(33))


def test_bad_numbers_rollback_keeps_the_notice_to_stop(tmp_path, poison, monkeypatch):
    """SIGTERM during the bad step: what goes on from the checkpoint stops after its first step."""
    check, before = NumbersWatch.check, signal.getsignal(signal.SIGTERM)

    def told(self, step, **numbers):
        if step == POISONED + 1 and not (tmp_path / "run" / "rollbacks.jsonl").exists():
            signal.raise_signal(signal.SIGTERM)
        check(self, step, **numbers)

    monkeypatch.setattr(NumbersWatch, "check", told)
    try:
        with pytest.raises(PreemptedError, match="after step 11, saved"):
            changes = {"train__bad_step": "rollback"}
            training.train(config(tmp_path / "run", **changes), workdir=tmp_path / "run")
    finally:
        signal.signal(signal.SIGTERM, before)


POISON = """
import time
import numpy as np
from spmd_train.data import Dataset
from spmd_train.train.bad_numbers import Rollbacks

batch, add = Dataset.batch, Rollbacks.add

def poisoned(self, step, **options):
    made = batch(self, step, **options)
    if step in (12, 27):
        made["weights"][0, 3] = np.nan
    return made

def late(self, **line):
    time.sleep(0.5)
    add(self, **line)

Dataset.batch, Rollbacks.add = poisoned, late
"""


def test_bad_numbers_rollbacks_of_several_processes(tmp_path):
    """One of them writes the line, the others may read it no sooner and no later."""
    changes = {"train__bad_step": "rollback", "train__num_steps": 40}
    words = faults.command(tmp_path / "run", devices=1, **changes)
    codes, said = faults.run_together(words, folder=tmp_path, prelude={0: POISON, 1: POISON})
    assert codes == [0, 0], said
    lines = (tmp_path / "run" / "rollbacks.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 20]


def test_bad_numbers_abort_and_replay(tmp_path, poison, capsys):
    workdir = tmp_path / "run"
    with pytest.raises(BadStepError, match="step 13: the loss is nan"):
        training.train(config(workdir), workdir=workdir)
    assert steps.committed_steps(workdir / "checkpoints") == [10]
    poison()
    bundle = workdir / "bad_steps" / "13"
    assert main(["replay", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 13 and found["loss"] == "nan"
    assert found["batch"] == ["weights[0]"] and found["params"] == []
    assert found["grads"]
    # Damage after the step has nothing to do with it: without a checkpoint before, from the start.
    folder = workdir / "checkpoints"
    (folder / "10").rename(folder / "20")
    steps.quarantine(folder, 20)
    assert main(["replay", str(bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    # Nobody's pickles: an array of objects is refused, not run.
    with (bundle / "batch.npz").open("wb") as file:
        np.savez(file, weights=np.array([{}], dtype=object))
    with pytest.raises(ConfigError, match="is no bundle"):
        read_bundle(bundle)
    assert main(["replay", str(tmp_path)]) == 2
    assert main(["replay"]) == 2


def test_bad_numbers_spike():
    watch = NumbersWatch(TrainConfig(spike_factor=5, bad_step="rollback"))
    for step in range(1, 30):
        watch.check(step, loss=2.0, grad_norm=1.0 + step % 3)
    watch.check(30, loss=2.0, grad_norm=9.0)
    with pytest.raises(BadStepError, match=r"step 31.*spike_factor=5"):
        watch.check(31, loss=2.0, grad_norm=30.0)
    with contextlib.suppress(BadStepError):
        watch.check(32, loss=math.inf, grad_norm=1.0)
        raise AssertionError


def test_bad_numbers_skips_in_a_row_end_the_run():
    watch = NumbersWatch(TrainConfig(bad_step="skip", max_bad_steps=3))
    watch.check(1, loss=math.nan, grad_norm=1.0)
    watch.check(2, loss=math.nan, grad_norm=1.0)
    watch.check(3, loss=1.0, grad_norm=1.0)
    watch.check(4, loss=1.0, grad_norm=math.inf)
    watch.check(5, loss=1.0, grad_norm=math.inf)
    with pytest.raises(BadStepError, match="3 steps in a row"):
        watch.check(6, loss=1.0, grad_norm=math.inf)


def test_bad_numbers_rollbacks_survive_half_a_line(tmp_path):
    rollbacks = Rollbacks(tmp_path)
    line = {"step": 10, "skip": 3, "bad_step": 13, "why": "nan"}
    rollbacks.add(**line)
    with (tmp_path / "rollbacks.jsonl").open("ab") as file:
        file.write(b'{"step": 20, "sk')
    assert rollbacks.count() == 1
    rollbacks.add(**line | {"step": 20})
    assert rollbacks.count() == 2 and rollbacks.skipped(20) == 3
