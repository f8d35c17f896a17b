"""One run at a time writes into a workdir."""

import errno
import fcntl
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from spmd_train import cluster
from spmd_train.checkpoint import workdir as module
from spmd_train.checkpoint.workdir import hold
from spmd_train.cli.main import main
from spmd_train.config import ConfigError

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(module, "LOCK_SECONDS", 0)


def test_workdir_is_one_runs_until_it_ends(tmp_path):
    with hold(tmp_path), pytest.raises(ConfigError) as told:
        hold(tmp_path)
    assert f"--workdir={tmp_path}: process {os.getpid()} writes there" in str(told.value)
    hold(tmp_path).close()


def test_workdir_is_free_when_its_process_was_killed(tmp_path, monkeypatch):
    code = (
        "import pathlib, time; from spmd_train.checkpoint.workdir import hold; "
        f"held = hold(pathlib.Path({str(tmp_path)!r})); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as run:
        try:
            assert run.stdout and run.stdout.readline() == b"held\n"
            with pytest.raises(ConfigError, match=f"process {run.pid} writes there"):
                hold(tmp_path)
        finally:
            run.send_signal(signal.SIGKILL)
        monkeypatch.setattr(module, "LOCK_SECONDS", 60)
        hold(tmp_path).close()  # Waits for the one that is dying.


def test_workdir_of_a_machine_that_is_gone_is_not_lost(tmp_path, caplog):
    with hold(tmp_path):
        (tmp_path / ".lock").write_text("7 elsewhere")
        hold(tmp_path).close()
    assert "process 7 on elsewhere seems to train there, too" in caplog.text


def test_workdir_without_locks_is_trained_in(tmp_path, monkeypatch, caplog):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    hold(tmp_path).close()
    assert "nothing keeps a second run out" in caplog.text


def test_workdir_in_use_is_refused_with_nothing_written(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with hold(run):
        before = sorted(run.iterdir())
        assert main(["train", "--config.train.num_steps=1", f"--workdir={run}"]) == 2
        assert sorted(run.iterdir()) == before
    assert "writes there; stop it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "key, value", [("train.global_batch_size", 10**9), ("data.sequence_length", 10**12)]
)
def test_workdir_is_not_made_for_a_batch_that_no_host_can_hold(tmp_path, capsys, key, value):
    words = ["train", f"--config.{key}={value}", f"--workdir={tmp_path}/run"]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert f"{key} = {value}: this process's part of a batch takes" in told
    assert re.search(r"set at most [1-9]", told) and not list(tmp_path.iterdir())


def test_workdir_of_a_full_disk_is_held_without_a_name(tmp_path):
    (tmp_path / ".lock").symlink_to("/dev/full")
    hold(tmp_path).close()


def test_workdir_whose_holder_has_no_name_is_refused(tmp_path):
    with hold(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ConfigError, match="another process writes there"):
            hold(tmp_path)


def test_workdir_mistakes_are_shared(monkeypatch):
    with pytest.raises(ConfigError, match="mine"), cluster.sharing_mistakes():
        raise ConfigError("mine")
    with cluster.sharing_mistakes():
        pass
    monkeypatch.setattr(cluster, "tell_all", lambda text: ["", "process 1: no wandb", text])
    with pytest.raises(ConfigError, match="process 1: no wandb"), cluster.sharing_mistakes():
        pass
