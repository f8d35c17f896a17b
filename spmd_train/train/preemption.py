"""Being told to go: SIGTERM or Ctrl-C to any process, and all stop after the same step."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)
_asked = itertools.count(1)


class PreemptedError(Exception):
    """The run was told to stop, and has saved.

    Attributes:
        step: optimizer steps done and saved.
        interrupted: it was Ctrl-C here, not SIGTERM.
    """

    def __init__(self, step: int, *, interrupted: bool) -> None:
        super().__init__(f"stopped after step {step}, saved")
        self.step = step
        self.interrupted = interrupted


class StopNotice:
    """Notes SIGTERM and the first Ctrl-C, for good; a context manager, to be entered repeatedly.

    One process needs only the note. Several have to stop after the same step, or those that go on
    wait for ever: JAX's preemption service, which takes SIGTERM over when `jax.distributed` starts,
    tells all and picks the step. A second Ctrl-C interrupts at once; a second SIGTERM changes
    nothing, since what is wanted is under way.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._told = False
        self._agreed = False
        self._old: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopNotice:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._interrupt}
            if jax.process_count() == 1:
                handlers[signal.SIGTERM] = self._terminate
            self._old = {number: signal.signal(number, h) for number, h in handlers.items()}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._old.items():
            # Told once, it is leaving: a second SIGTERM must not spoil the exit code.
            leaving = self._told and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if leaving else handler)  # pyright: ignore[reportArgumentType]

    def agreed(self) -> bool:
        """Whether all processes stop here; all must ask as often: after each step, say."""
        if jax.process_count() == 1:
            return self._told
        # The service picks a number that none has come to yet, says so there, and never again.
        self._agreed |= multihost_utils.reached_preemption_sync_point(next(_asked))
        return self._agreed

    def _terminate(self, number: int, frame: FrameType | None) -> None:
        if not self._told:
            log.warning("told to stop (SIGTERM): saving after this step")
        self._told = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        log.warning("interrupted: saving after this step; once more stops at once")
        self.interrupted = self._told = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)
