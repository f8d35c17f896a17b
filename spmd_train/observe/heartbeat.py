"""A sign of life for `spmd-train launch`: the step and the last checkpoint."""

from __future__ import annotations

import os

HANDLE = "SPMD_TRAIN_HEARTBEAT"
"""The environment variable with the number of an open, inherited file; unset: nobody looks."""


class Heartbeat:
    """Writes `STEP CHECKPOINT` over what it wrote before, in one write."""

    def __init__(self) -> None:
        text = os.environ.get(HANDLE)
        self._handle = int(text) if text else None

    def beat(self, step: int, checkpoint: int) -> None:
        """Tells that the run lives.

        Args:
            step: optimizer steps done.
            checkpoint: the last step known to be saved; -1: none.
        """
        if self._handle is not None:
            os.pwrite(self._handle, f"{step:>15} {checkpoint:>15}\n".encode(), 0)
