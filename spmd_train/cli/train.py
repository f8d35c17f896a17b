"""`spmd-train train`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import jax

from spmd_train import training
from spmd_train.parallel.replicas import CorruptStateError
from spmd_train.train.bad_numbers import BadStepError
from spmd_train.train.preemption import PreemptedError

_PREEMPTED = 75
_INTERRUPTED = 130
log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Trains; the same command line resumes."""
    try:
        with _leaving_at_once():
            training.train(args.config, workdir=args.workdir, age=time.time() - args.started)
    except PreemptedError as stop:
        log.warning("%s; the same command line goes on from there", stop)
        return _INTERRUPTED if stop.interrupted else _PREEMPTED
    except BadStepError:
        return 1
    except CorruptStateError as corrupt:
        log.error("%s", corrupt)
        return 1
    return 0


@contextlib.contextmanager
def _leaving_at_once() -> Iterator[None]:
    """SIGTERM before the first step and after the last: nothing is to be saved.

    Meanwhile the run has its own answer, and among several processes JAX has.
    """
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second must not spoil the exit code.
        log.warning("told to stop (SIGTERM) between steps; the same command line goes on")
        sys.exit(_PREEMPTED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is leave:
            signal.signal(signal.SIGTERM, before)
