"""Folders that a flag names, to be written to."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from spmd_train.config import ConfigError

# What stays as it is until the user does something. Of others (EIO, ESTALE, ETIMEDOUT) a disk or a
# network may recover: they are crashes, which `launch` restarts.
_LASTING = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR),
        *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL),
    }
)


@contextlib.contextmanager
def writing(path: Path, *, flag: str, cure: str = "give another folder") -> Iterator[None]:
    """What keeps the user from writing below a path is told as a mistake in its flag.

    Args:
        path: the flag's value.
        flag: its name.
        cure: what to do.

    Raises:
        ConfigError: the path is not there to be written to, and will not be by itself.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _LASTING:
            raise
        raise ConfigError(f"--{flag}={path}: cannot be written to ({error}); {cure}") from error


def make_folder(path: Path, *, flag: str) -> None:
    """Makes a folder and tries to write to it.

    Raises:
        ConfigError: it cannot be written to.
    """
    with writing(path, flag=flag):
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
