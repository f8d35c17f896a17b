"""The folder of a run: it can be written to, and one run at a time does."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import IO

from spmd_train import cluster
from spmd_train.config import ConfigError

log = logging.getLogger(__name__)

LOCK_SECONDS = 5
"""How long the run before, which may be dying, has to let go."""

_CURED_BY_THE_USER = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.ENOSPC, errno.EDQUOT),
}


def check_workdir(workdir: Path) -> None:
    """Makes the folder of a run.

    Raises:
        ConfigError: it cannot be written to.
        OSError: it cannot now; what ails the file system may pass.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        if error.errno not in _CURED_BY_THE_USER:
            raise
        raise ConfigError(
            f"--workdir={workdir}: cannot be written to ({error}); give another folder"
        ) from error


def hold(workdir: Path) -> IO[str]:
    """Keeps other runs on this machine out of the folder while the file returned is open.

    By `flock`, which falls with the process however that ends. What a machine that is gone seems to
    hold, over a network, is only warned of, and so is a file system without locks.

    Raises:
        ConfigError: another process of this machine holds it.
    """
    file = (workdir / ".lock").open("a+")
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder, _, on = file.read().partition(" ")
            if on != cluster.host():
                log.warning("%s: process %s on %s seems to train there, too", workdir, holder, on)
                return file
            if time.monotonic() > end:
                file.close()
                raise ConfigError(
                    f"--workdir={workdir}: process {holder} trains there; stop it (its run goes on "
                    "with the same command line), or give another folder"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            log.warning("%s: nothing keeps a second run out of it (%s)", workdir, error)
            return file
    file.truncate(0)
    file.write(f"{os.getpid()} {cluster.host()}")
    file.flush()
    return file
