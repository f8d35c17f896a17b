"""Folders that a flag names: whether they can be written to, and who works in one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from spmd_train.config import ConfigError

# What stays as it is until the user does something. Of others (EIO, ESTALE, ETIMEDOUT) a disk or a
# network may recover: they are crashes, which `launch` restarts.
_LASTING = frozenset(
    {
        *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
        *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    }
)
# A network's file server keeps the lock of a host that was cut off for this long; NFS: 90 s.
_LEASE_SECONDS = 100.0
_LOCK = "lock"

log = logging.getLogger(__name__)


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


def claim(workdir: Path) -> BinaryIO:
    """Takes the folder of a run for this process, until what it returns is closed.

    The lock is POSIX's: it falls with the process, however that ends, and children that it forks
    have no part in it. A file system without locks keeps nobody out.

    Args:
        workdir: the folder, which is there.

    Returns:
        The lock; a context manager.

    Raises:
        ConfigError: another process has taken it.
    """
    with writing(workdir, flag="workdir"):
        file = (workdir / _LOCK).open("a+b", buffering=0)
    limit = time.monotonic() + _LEASE_SECONDS
    while _is_taken(file):
        file.seek(0)
        pid, host, machine, *_ = [*file.read().decode(errors="replace").split(), *"???"]
        if machine == _machine() or time.monotonic() > limit:
            file.close()
            raise ConfigError(
                f"--workdir={workdir}: another process writes to it (pid {pid} on {host}); stop "
                "that one, or give another --workdir"
            )
        log.warning("%s: waiting for pid %s on %s, which writes to it", workdir, pid, host)
        time.sleep(_LEASE_SECONDS / 10)
    with contextlib.suppress(OSError):  # A full disk: the holder has no name.
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()} {_machine()}\n".encode())
    return file


def _is_taken(file: BinaryIO) -> bool:
    """Tries to lock a file."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        log.info("%s: no locks here, another trainer would not be noticed: %s", file.name, error)
    return False


def _machine() -> str:
    """The same in all containers of a machine; their host names may come again elsewhere."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
