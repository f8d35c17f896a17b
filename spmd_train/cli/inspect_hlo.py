"""`spmd-train inspect hlo`: the train step's program; with `--diff`, two of them compared."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from typing import Any

from spmd_train import experiment
from spmd_train.cli.files import check_folder, write_file
from spmd_train.cli.targets import compile_here, devices_of
from spmd_train.config import ConfigError, ExperimentConfig
from spmd_train.plan.compare import Side, compare, format_comparison, measures
from spmd_train.plan.compiled import CompiledStep
from spmd_train.train.program import Program

log = logging.getLogger(__name__)


def run(args: argparse.Namespace) -> int:
    """Prints, writes or compares the programs of `args.config` and `args.diff`."""
    check_folder(args.out, flag="out")
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
        first = compile_here(program, args, options)
        if args.diff is None:
            return _show(args, first.hlo_text, mesh=program.mesh.shape, told=measures(first))
        second_program = experiment.build(args.diff, devices=devices).program
        second = compile_here(second_program, args, options)
    told = compare(
        _side(args.names[0], args.config, program, first),
        _side(args.names[1], args.diff, second_program, second),
    )
    if args.out is not None:
        write_file(args.out, first.hlo_text, flag="out")
        write_file(args.out.with_name(f"{args.out.name}.diff"), second.hlo_text, flag="out")
    if args.json:
        print(json.dumps(told, indent=2))
        return 0
    for line in format_comparison(told):
        print(line)
    return 0


def _side(name: str, config: ExperimentConfig, program: Program, step: CompiledStep) -> Side:
    return Side(name=name, config=config, mesh=dict(program.mesh.shape), step=step)


def _show(
    args: argparse.Namespace, text: str, *, mesh: Mapping[str, int], told: Mapping[str, Any]
) -> int:
    if args.out is not None:
        write_file(args.out, text, flag="out")
    if args.json:
        document = {"mesh": dict(mesh), "stage": args.stage, **told}
        print(json.dumps(document if args.out else document | {"hlo": text}, indent=2))
    elif args.out is None:
        print(text)
    return 0
