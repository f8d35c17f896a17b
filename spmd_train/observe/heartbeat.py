"""A sign of life for `spmd-train launch`: the step and the last checkpoint, in a file."""

from __future__ import annotations

import os

FILE = "SPMD_TRAIN_HEARTBEAT"
"""The environment variable that names the file; unset: no supervisor looks."""


class Heartbeat:
    """Writes `STEP CHECKPOINT`, in one write; the file's time of change is the sign of life."""

    def __init__(self) -> None:
        path = os.environ.get(FILE)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT) if path else None

    def beat(self, step: int, checkpoint: int) -> None:
        """Tells that the run lives.

        Args:
            step: optimizer steps done.
            checkpoint: the last step known to be saved; -1: none.
        """
        if self._handle is not None:
            os.pwrite(self._handle, f"{step:>15} {checkpoint:>15}\n".encode(), 0)

    def close(self) -> None:
        """Closes the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
