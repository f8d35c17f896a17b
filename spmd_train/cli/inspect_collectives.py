"""`spmd-train inspect collectives`: what a train step sends between devices."""

from __future__ import annotations

import argparse
import json

from spmd_train import experiment
from spmd_train.cli.targets import compile_here, devices_of
from spmd_train.inspect.collectives import collective_summary, format_collectives
from spmd_train.parallel.mesh import mesh_text
from spmd_train.plan.hlo_cost import program_cost
from spmd_train.plan.overlap import overlap, overlap_json, overlap_lines


def run(args: argparse.Namespace) -> int:
    """Compiles the train step of `args.config` and prints its collectives."""
    with devices_of(args) as (devices, options):
        program = experiment.build(args.config, devices=devices).program
        step = compile_here(program, args, options)
    summary = collective_summary(step.collectives)
    mesh = dict(program.mesh.shape)
    told_overlap = overlap(step.collectives, program_cost(step.hlo_text))
    if args.json:
        told = {"mesh": mesh, "num_devices": program.mesh.size, **summary}
        told["overlap"] = overlap_json(told_overlap)
        print(json.dumps(told | {"compile_seconds": step.compile_seconds}, indent=2))
        return 0
    print(f"mesh: {mesh_text(mesh)}")
    print("")
    print(format_collectives(summary))
    for line in overlap_lines(told_overlap):
        print(line)
    return 0
