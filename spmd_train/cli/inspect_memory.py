"""`spmd-train inspect memory`: what a train step takes of a device's memory."""

from __future__ import annotations

import argparse
import json

from spmd_train import experiment
from spmd_train.cli.formats import format_bytes
from spmd_train.cli.targets import compile_here, devices_of
from spmd_train.inspect.shardings import sharding_table
from spmd_train.parallel.mesh import mesh_text

_TOLD = {
    "argument_bytes": "arguments: the train state and a batch",
    "output_bytes": "outputs: the new state and the metrics",
    "alias_bytes": "outputs that take the place of arguments",
    "temp_bytes": "temporaries: activations, gradients, buffers of collectives",
    "peak_bytes": "peak: arguments + outputs - aliased + temporaries",
    "generated_code_bytes": "the program itself",
    "host_argument_bytes": "in the host's memory: moments, where optimizer.offload is host",
    "host_temp_bytes": "in the host's memory: what model.remat_offloaded names",
}


def run(args: argparse.Namespace) -> int:
    """Compiles the train step of `args.config` and prints the compiler's account of its memory."""
    with devices_of(args) as (devices, options):
        program = experiment.build(args.config, devices=devices).program
        step = compile_here(program, args, options)
    mesh = dict(program.mesh.shape)
    totals = sharding_table(program.plans).totals
    state = {name: total.bytes_per_device for name, total in totals.items()}
    if args.json:
        told = {
            "mesh": mesh,
            "num_devices": program.mesh.size,
            "per_device": step.memory,
            "state": state,
            "compile_seconds": step.compile_seconds,
        }
        print(json.dumps(told, indent=2))
        return 0
    print(f"mesh: {mesh_text(mesh)}")
    print("\nper device, as the sharding plan says:")
    for name, count in state.items():
        print(f"{format_bytes(count):>12}  {name}")
    print("\nper device, as the compiler says:")
    for name, meaning in _TOLD.items():
        print(f"{format_bytes(step.memory[name]):>12}  {meaning}")
    return 0
