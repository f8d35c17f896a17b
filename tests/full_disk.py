"""Trains in WORKDIR on a small disk that is full until two saves have failed, then has room.

    unshare -Urm sh -c 'mount -t tmpfs -o ... DISK && python full_disk.py DISK RESULT WORDS'

What is left in the end is copied to RESULT, for the disk goes with its namespace.
"""

from __future__ import annotations

import errno
import logging
import pathlib
import shutil
import sys

from spmd_train.cli.main import main

disk, result = map(pathlib.Path, sys.argv[1:3])
ballast = disk / "ballast"
with ballast.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        assert error.errno == errno.ENOSPC
# A few pages for the metrics, too few for a checkpoint.
with ballast.open("r+b") as file:
    file.truncate(ballast.stat().st_size - 16 * 4096)
failures = 0


class MakeRoom(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        global failures
        if "could not be written (" in record.getMessage():
            failures += 1
            print("left:", sorted(p.name for p in (disk / "run" / "checkpoints").iterdir()))
            if failures == 2:
                ballast.unlink()


logging.getLogger("spmd_train").addHandler(MakeRoom())
code = main(sys.argv[3:])
print("failures:", failures)
shutil.copytree(disk / "run", result)
sys.exit(code)
