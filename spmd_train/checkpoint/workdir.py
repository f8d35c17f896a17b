"""The folder of a run: one run at a time writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

from spmd_train import cluster
from spmd_train.config import ConfigError
from spmd_train.folders import writing

log = logging.getLogger(__name__)

LOCK_SECONDS = 5
"""How long the run before, which may be dying, has to let go."""


def hold(workdir: Path) -> BinaryIO:
    """Keeps other runs on this machine out of the folder while the file returned is open.

    By `flock`, which falls with the process however that ends. What a machine that is gone seems to
    hold, over a network, is only warned of, and so is a file system without locks.

    Raises:
        ConfigError: another process of this machine holds it.
    """
    with writing(workdir, flag="workdir"):
        file = (workdir / ".lock").open("a+b", buffering=0)
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder, _, on = file.read().decode(errors="replace").partition(" ")
            if on not in ("", cluster.host()):
                log.warning("%s: process %s on %s seems to train there, too", workdir, holder, on)
                return file
            if time.monotonic() > end:
                file.close()
                who = f"process {holder}" if holder else "another process"
                raise ConfigError(
                    f"--workdir={workdir}: {who} writes there; stop it (its run goes on "
                    "with the same command line), or give another folder"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            log.warning("%s: nothing keeps a second run out of it (%s)", workdir, error)
            return file
    with contextlib.suppress(OSError):  # A full disk: the holder has no name.
        file.truncate(0)
        file.write(f"{os.getpid()} {cluster.host()}".encode())
    return file
