"""`spmd-train inspect hlo`: the train step's program; with `--diff`, two of them compared."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from spmd_train import experiment
from spmd_train.cli.targets import devices_of
from spmd_train.config import ConfigError, ExperimentConfig
from spmd_train.plan.compare import Side, compare, format_comparison, measures
from spmd_train.plan.compiled import CompiledStep, DoesNotFitError, compile_step
from spmd_train.train.program import Program

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Prints, writes or compares the programs of `args.config` and `args.diff`."""
    with devices_of(args) as (devices, options):
        if args.diff is not None and args.stage == "lowered":
            raise ConfigError(
                "--stage=lowered: --diff compares what the compiler made; a lowered program has no "
                "collectives and no memory yet"
            )
        program = experiment.build(args.config, devices=devices).program
        if args.stage == "lowered":
            text, told = program.lower_train_step().as_text(), {}
            return _show(args, text, mesh=program.mesh.shape, told=told)
        first = _compile(program, args, options)
        if args.diff is None:
            return _show(args, first.hlo_text, mesh=program.mesh.shape, told=measures(first))
        second_program = experiment.build(args.diff, devices=devices).program
        second = _compile(second_program, args, options)
    told = compare(
        _side(args.names[0], args.config, program, first),
        _side(args.names[1], args.diff, second_program, second),
    )
    if args.out is not None:
        _write(args.out, first.hlo_text)
        _write(args.out.with_name(f"{args.out.name}.diff"), second.hlo_text)
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    for line in format_comparison(told):
        print(line)
    return 0


def _side(name: str, config: ExperimentConfig, program: Program, step: CompiledStep) -> Side:
    return Side(name=name, config=config, mesh=dict(program.mesh.shape), step=step)


def _compile(
    program: Program, args: argparse.Namespace, options: Mapping[str, Any]
) -> CompiledStep:
    if args.target is not None:
        log.info("compiling for %s, which can take minutes", args.target)
    try:
        return compile_step(program, options=options)
    except DoesNotFitError as error:
        sizes = [f"{axis}={size}" for axis, size in program.mesh.shape.items() if size > 1]
        raise ConfigError(
            f"--target={args.target}: the compiler refuses the program on {' x '.join(sizes)} for "
            f"want of memory: it needs {error.needed_bytes or 'more'} bytes of a device; "
            "`spmd-train plan` finds what makes it fit"
        ) from error


def _show(
    args: argparse.Namespace, text: str, *, mesh: Mapping[str, int], told: Mapping[str, Any]
) -> int:
    if args.out is not None:
        _write(args.out, text)
    if args.json:
        document = {"mesh": dict(mesh), "stage": args.stage, **told}
        print(json.dumps(document if args.out else document | {"hlo": text}, indent=2))
    elif args.out is None:
        print(text)
    return 0


def _write(path: pathlib.Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out={path}: cannot be written: {error}") from error
    log.info("written to %s: %d lines", path, text.count("\n"))
