"""Several real processes: what dies is restarted, and ends where the uninterrupted run ends."""

from __future__ import annotations

import itertools
import os
import re
import signal

import fault_helpers as faults
import pytest

from spmd_train.observe import read_examples, read_jsonl
from spmd_train.observe.report import read_report

STEPS = faults.TINY["train.num_steps"]


def launch(workdir, *, num_processes=2, hang_seconds=60, max_restarts=3, devices=2, **changes):
    flags = {
        "num_processes": num_processes,
        "simulate_devices": devices,
        "max_restarts": max_restarts,
        "hang_seconds": hang_seconds,
    }
    words = [f"--{name}={value}" for name, value in flags.items()]
    changes = {"train__log_examples": "true"} | changes
    return ["launch", *words, "--", *faults.command(workdir, devices=0, **changes)]


def pids(log, attempt):
    """Process ids of an attempt's ranks, as the supervisor tells them."""
    found = re.search(rf"attempt {attempt}: \d+ processes \[([\d, ]+)\]", log.read_text())
    return [int(pid) for pid in found[1].split(",")] if found else []


def reach(workdir, log, *, attempt, step):
    faults.until(lambda: len(pids(log, attempt)) > 0, what=f"attempt {attempt}")
    faults.until(
        lambda: f"attempt {attempt}" in log.read_text() and faults.steps_logged(workdir) >= step,
        what=f"step {step} of attempt {attempt}",
        seconds=180,
    )


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of two processes with two devices each."""
    folder = tmp_path_factory.mktemp("launch")
    log = folder / "log"
    assert faults.run(launch(folder / "run"), log=log, seconds=300) == 0, log.read_text()
    return folder


def test_launch_each_host_does_its_part(whole):
    workdir = whole / "run"
    assert len(read_jsonl(workdir / "metrics.jsonl")) == STEPS
    batches = read_examples(workdir)
    assert sorted(batches) == list(range(STEPS))
    ids = [batches[n][row] for n in range(STEPS) for row in range(8)]
    assert len(set(ids)) == len(ids), "one epoch holds each example once"
    for process in (0, 1):
        line = (workdir / "examples" / f"{process}.jsonl").read_text().splitlines()[0]
        rows = "[0, 1, 2, 3]" if process == 0 else "[4, 5, 6, 7]"
        assert f'"rows": {rows}' in line
    state = workdir / "checkpoints" / str(STEPS) / "state"
    assert {p.name for p in state.glob("ocdbt.process_*")} == {"ocdbt.process_0", "ocdbt.process_1"}


def test_launch_survives_kill_preemption_and_hang(whole):
    workdir, log = whole / "chaos", whole / "chaos.log"
    words = launch(workdir, hang_seconds=20)
    run = faults.start(words, log=log)
    reach(workdir, log, attempt=1, step=12)
    first = pids(log, 1)
    os.kill(first[1], signal.SIGKILL)
    reach(workdir, log, attempt=2, step=22)
    assert all(map(gone, first))
    # One rank alone is told, and all stop after the same step.
    os.kill(pids(log, 2)[1], signal.SIGTERM)
    assert faults.end(run, log=log) == 75, log.read_text()
    text = log.read_text()
    assert "rank 1 died (killed by SIGKILL)" in text and "stepping again" in text
    assert len(set(re.findall(r"stopped after step (\d+), saved", text))) == 1

    log = whole / "hang.log"
    run = faults.start(words, log=log)
    reach(workdir, log, attempt=1, step=45)
    os.kill(pids(log, 1)[0], signal.SIGSTOP)
    assert faults.end(run, log=log) == 0, log.read_text()
    text = log.read_text()
    assert "stopped by a signal: cannot answer" in text and "hung: rank" in text
    assert "run_loop" in text, "the stack of the rank that waits"
    assert all(gone(pid) for attempt in (1, 2) for pid in pids(log, attempt))
    faults.assert_same(faults.final_params(workdir), faults.final_params(whole / "run"))
    assert read_examples(workdir) == read_examples(whole / "run")

    told = read_report(workdir).account
    assert [a.ended for a in told.attempts] == ["killed", "PreemptedError", "killed", "done"]
    assert told.attempts[2].first_step == told.attempts[1].last_step, "saved when told to stop"
    wall = told.attempts[-1].end - told.attempts[0].start
    assert told.wall_seconds == pytest.approx(wall, abs=0.01)
    assert told.seconds["down"] > 15, "it hung for 20 s"
    assert told.wasted_steps == sum(
        one.last_step - other.first_step for one, other in itertools.pairwise(told.attempts)
    )


def test_launch_gives_up_without_progress(whole):
    workdir, log = whole / "hopeless", whole / "hopeless.log"
    workdir.mkdir()
    (workdir / "checkpoints").write_text("in the way")
    assert faults.run(launch(workdir, num_processes=1, max_restarts=1), log=log) == 1
    text = log.read_text()
    assert "attempt 2: rank 0 died" in text and "attempt 3: 1 processes" not in text
    assert "Giving up: restarted 1 times and no checkpoint" in text


def test_launch_user_errors_are_not_retried(tmp_path):
    log = tmp_path / "log"
    assert faults.run(launch(tmp_path / "run", train__num_step=3), log=log) == 2
    assert "attempt 2" not in log.read_text() and "num_step" in log.read_text()
    assert faults.run(["launch", "--num_processes=2", "--", "inspect"], log=log) == 2
    assert faults.run(["launch", "--num_processes=2"], log=log) == 2


def test_launch_takes_its_processes_along(whole):
    workdir, log = whole / "orphans", whole / "orphans.log"
    run = faults.start(launch(workdir), log=log)
    faults.until(lambda: len(pids(log, 1)) == 2, what="start")
    faults.until(lambda: "process 1 of 2" in log.read_text(), what="connected")
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    faults.until(lambda: all(map(gone, pids(log, 1))), what="its ranks end", seconds=20)
