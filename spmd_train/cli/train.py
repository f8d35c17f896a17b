"""`spmd-train train`."""

from __future__ import annotations

import argparse

from spmd_train import experiment


def run(args: argparse.Namespace) -> int:
    """Trains; the same command line resumes."""
    experiment.train(args.config, workdir=args.workdir)
    return 0
