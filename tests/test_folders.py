"""Folders that a flag names: what keeps from writing there."""

from __future__ import annotations

import errno
import tempfile

import pytest

from spmd_train.config import ConfigError
from spmd_train.folders import make_folder


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
