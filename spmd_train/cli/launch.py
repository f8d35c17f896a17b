"""`spmd-train launch`: local processes, supervised."""

from __future__ import annotations

import argparse

from spmd_train.cli.config_flags import split_overrides
from spmd_train.cli.verbs import VERBS
from spmd_train.config import ConfigError
from spmd_train.launch import Options, Supervisor


def run(args: argparse.Namespace) -> int:
    """Runs `args.command` as processes."""
    words = list(args.command)
    verb = next((v for v in VERBS if v.uses_processes and list(v.words) == words[:1]), None)
    if verb is None:
        able = " or ".join(v.words[0] for v in VERBS if v.uses_processes)
        raise ConfigError(f"-- {words[0]}: runs in one process; must be {able}")
    split_overrides(words)
    if args.simulate_devices is not None:
        words.append(f"--simulate_devices={args.simulate_devices}")
    options = Options(
        num_processes=args.num_processes,
        max_restarts=args.max_restarts,
        hang_seconds=args.hang_seconds,
        start_seconds=args.start_seconds,
    )
    return Supervisor(words, options).run()
