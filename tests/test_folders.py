"""Folders that a flag names: what keeps from writing there, and who writes there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
import tempfile

import pytest
from fault_helpers import environment

from spmd_train import folders
from spmd_train.config import ConfigError
from spmd_train.folders import claim, make_folder

# Takes the folder, and has a child that lives on for a while.
HOLDER = """
import os, pathlib, sys, time
from spmd_train.folders import claim
with claim(pathlib.Path(sys.argv[1])):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(120)
"""


def test_folder_below_a_file_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--workdir=\S+/file/run: cannot be .*another folder"):
        make_folder(tmp_path / "file" / "run", flag="workdir")
    with pytest.raises(ConfigError, match="too long"):
        make_folder(tmp_path / ("x" * 300), flag="workdir")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_folder_that_may_recover_is_a_crash(tmp_path, monkeypatch, number):
    def fail(**_):
        raise OSError(number, "brief")

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(OSError, match="brief"):
        make_folder(tmp_path, flag="workdir")


@pytest.fixture
def holder(tmp_path):
    """A process that has taken the folder, and its child."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, env=environment()) as process:
        child = int(process.stdout.readline())
        yield process
        process.kill()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_folder_is_one_process_s_until_it_dies(tmp_path, holder):
    for _ in range(2):  # To be refused takes nothing from the holder, not even its name.
        with pytest.raises(ConfigError, match=rf"another process .*pid {holder.pid} on .*give an"):
            claim(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    claim(tmp_path).close()
    assert (tmp_path / "lock").read_text().startswith(f"{os.getpid()} ")


def test_folder_of_a_host_that_was_cut_off_is_waited_for(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(folders, "_machine", lambda: "another")
    monkeypatch.setattr(folders, "_LEASE_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=f"pid {holder.pid} on"):
        claim(tmp_path)
    assert f"waiting for pid {holder.pid}" in caplog.text
    monkeypatch.setattr(folders, "_LEASE_SECONDS", 5)
    monkeypatch.setattr(folders.time, "sleep", lambda _: (holder.kill(), holder.wait()))
    claim(tmp_path).close()


def test_folder_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    claim(tmp_path).close()
