"""`--target` for the verbs that compile: a program on the devices that it names."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spmd_train.config import ConfigError
from spmd_train.parallel.mesh import mesh_text
from spmd_train.plan.compiled import CompiledStep, DoesNotFitError, compile_step
from spmd_train.plan.targets import Target, parse_target
from spmd_train.plan.topologies import compiler_options, open_target
from spmd_train.train.program import Program

log = logging.getLogger(__name__)


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


def compile_here(
    program: Program, args: argparse.Namespace, options: Mapping[str, Any]
) -> CompiledStep:
    """The train step, compiled on what `devices_of` gave.

    Raises:
        ConfigError: the compiler says that it does not fit.
    """
    if args.target is not None:
        log.info("compiling for %s, which can take minutes", args.target)
    try:
        return compile_step(program, options=options)
    except DoesNotFitError as error:
        where = f"--target={args.target}" if args.target else "the devices at hand"
        raise ConfigError(
            f"{where}: the compiler refuses the program on {mesh_text(program.mesh.shape)} for "
            f"want of memory: it needs {error.needed_bytes or 'more'} bytes of a device; "
            "`spmd-train plan` finds what makes it fit"
        ) from error


@contextlib.contextmanager
def open_devices(args: argparse.Namespace) -> Iterator[tuple[Target, Sequence[Any], Mapping]]:
    """The target of `args.target`, its devices and XLA's options for it."""
    target = parse_target(args.target)
    if args.simulate_devices is not None:
        raise ConfigError("--simulate_devices: leave it out with --target; cpu:N simulates")
    with open_target(target) as devices:
        yield target, devices, compiler_options(target)
