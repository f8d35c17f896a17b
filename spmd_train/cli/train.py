"""`spmd-train train`."""

from __future__ import annotations

import argparse
import logging
import time

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
