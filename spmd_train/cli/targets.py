"""`--target` for the verbs that compile: a program on the devices that it names."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spmd_train.config import ConfigError
from spmd_train.plan.targets import Target, parse_target
from spmd_train.plan.topologies import compiler_options, open_target


@contextlib.contextmanager
def devices_of(args: argparse.Namespace) -> Iterator[tuple[Sequence[Any] | None, Mapping]]:
    """Devices to build on, None for those at hand, and XLA's options to compile with.

    Raises:
        ConfigError: the target cannot be had, or `--simulate_devices` contradicts it.
    """
    if args.target is None:
        yield None, {}
        return
    with open_devices(args) as (_, devices, options):
        yield devices, options


@contextlib.contextmanager
def open_devices(args: argparse.Namespace) -> Iterator[tuple[Target, Sequence[Any], Mapping]]:
    """The target of `args.target`, its devices and XLA's options for it."""
    target = parse_target(args.target)
    if args.simulate_devices is not None:
        raise ConfigError("--simulate_devices: leave it out with --target; cpu:N simulates")
    with open_target(target) as devices:
        yield target, devices, compiler_options(target)
