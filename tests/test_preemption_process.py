"""Told to stop: saved, exit 75, and the same command line ends where it would have ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import fault_helpers as faults
import jax
import pytest
from jax.experimental import multihost_utils

from spmd_train.checkpoint.steps import committed_steps
from spmd_train.train.preemption import StopNotice


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The parameters of the uninterrupted run, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    log = folder / "log"
    assert faults.run(faults.command(folder / "run"), log=log) == 0, log.read_text()
    return folder, faults.final_params(folder / "run")


@pytest.mark.parametrize("name, code", [("SIGTERM", 75), ("SIGINT", 130)])
def test_preemption_one_process(whole, name, code):
    folder, expected = whole
    workdir, log = folder / name, folder / f"{name}.log"
    process = faults.start(faults.command(workdir, train__checkpoint_every=1000), log=log)
    faults.until(lambda: faults.steps_logged(workdir) >= 2, what="two steps")
    process.send_signal(getattr(signal, name))
    assert faults.end(process, log=log) == code, log.read_text()
    (saved,) = [int(p) for p in os.listdir(workdir / "checkpoints")]
    assert 2 <= saved < 60
    assert faults.run(faults.command(workdir), log=log) == 0, log.read_text()
    assert f"goes on from step {saved}" in log.read_text()
    faults.assert_same(faults.final_params(workdir), expected)


def test_preemption_repeated_during_the_save(whole):
    folder = whole[0]
    workdir, log = folder / "twice", folder / "twice.log"
    process = faults.start(faults.command(workdir, train__num_steps=5000), log=log)
    faults.until(lambda: faults.steps_logged(workdir) >= 6, what="six steps")
    while process.poll() is None:
        process.send_signal(signal.SIGTERM)
    assert faults.end(process, log=log) == 75, log.read_text()
    assert "told to stop" in log.read_text()
    assert faults.run(["checkpoints", "verify", f"--workdir={workdir}"], log=log) == 0


def test_full_disk_training_goes_on(whole):
    folder, expected = whole
    disk, log = folder / "disk", folder / "disk.log"
    disk.mkdir()
    words = faults.command(
        disk / "run",
        data__path=folder / "text.txt",
        data__cache_dir=folder / "tokens",
        checkpoint__keep_last=1,
    )
    script = faults.ROOT / "tests" / "full_disk.py"
    mount = f'mount -t tmpfs -o size=1536k tmpfs {disk} && exec "$@"'
    inside = [sys.executable, str(script), str(disk), str(folder / "result"), *words]
    with log.open("wb") as output:
        done = subprocess.run(
            ["unshare", "-Urm", "sh", "-c", mount, "sh", *inside],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=faults.environment(),
            timeout=300,
            check=False,
        )
    text = log.read_text()
    assert done.returncode == 0, text
    assert "failures: 2" in text and "No space left" in text
    assert "(2 of checkpoint.max_failures=3 in a row)" in text
    assert sorted(os.listdir(folder / "result" / "checkpoints")) == ["60"]
    faults.assert_same(faults.final_params(folder / "result"), expected)


def test_preemption_agreed_upon_stays_so(monkeypatch):
    """After the last step, say, when the evaluation asks again: the service answers once."""
    answers = iter([False, True, False, False])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        multihost_utils, "reached_preemption_sync_point", lambda step: next(answers)
    )
    notice = StopNotice()
    assert [notice.agreed() for _ in range(4)] == [False, True, True, True]


HASHES_SLOWLY = """
import os, time
os.environ["SPMD_TRAIN_SHUTDOWN_SECONDS"] = "5"
from spmd_train.checkpoint import steps

commit = steps.commit

def late(*args):
    time.sleep(15)
    return commit(*args)

steps.commit = late
"""


def test_preemption_save_is_waited_for_by_all_processes(tmp_path):
    """Process 0 hashes for longer than JAX lets the others wait for it at the end."""
    words = faults.command(tmp_path / "run", devices=1, train__num_steps=3)
    prelude = {0: HASHES_SLOWLY, 1: HASHES_SLOWLY}
    codes, said = faults.run_together(words, folder=tmp_path, prelude=prelude)
    assert codes == [0, 0], said
    assert committed_steps(tmp_path / "run" / "checkpoints") == [3]
