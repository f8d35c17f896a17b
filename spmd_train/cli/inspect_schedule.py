"""`spmd-train inspect schedule`: the pipeline's ticks, what they cost, and a picture of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from spmd_train import experiment
from spmd_train.cli.files import write_file
from spmd_train.cli.formats import format_bytes
from spmd_train.config import ConfigError, ExperimentConfig
from spmd_train.inspect.schedule import (
    format_grid,
    gather_costs,
    schedule_report,
    schedule_svg,
)
from spmd_train.parallel.mesh import mesh_text
from spmd_train.parallel.stages import loads
from spmd_train.train.pipeline import Pipeline
from spmd_train.train.program import Program


def run(args: argparse.Namespace) -> int:
    """Prints the schedule of `args.config`; compiles nothing."""
    program = experiment.build(args.config).program
    if program.pipeline is None:
        raise ConfigError(
            "mesh.pipeline: 1 stage needs no schedule; set it to 2 or more (and "
            "--simulate_devices to what the mesh takes)"
        )
    report = _report(args.config, program, program.pipeline)
    if args.svg is not None:
        write_file(args.svg, schedule_svg(program.pipeline.schedule), flag="svg")
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for line in _lines(report, program.pipeline):
        print(line)
    return 0


def _report(config: ExperimentConfig, program: Program, pipe: Pipeline) -> dict[str, Any]:
    schedule, mesh = pipe.schedule, dict(program.mesh.shape)
    compute_bytes = jnp.dtype(pipe.task.compute_dtype).itemsize
    rows = config.train.global_batch_size // pipe.num_parts // schedule.num_microbatches
    rows //= program.layout.size(program.layout.axes("batch"))
    tokens = rows * config.data.sequence_length
    tokens //= program.layout.size(program.layout.axes("residual_sequence"))
    activation = tokens * config.model.embed_dim * compute_bytes
    params = {path.removeprefix("params/"): plan for path, plan in program.plans.items()}
    costs = gather_costs(
        {path: plan for path, plan in params.items() if path in program.layout.param_specs},
        stack=pipe.task.stack,
        schedule=schedule,
        stages=pipe.stages,
        num_parts=pipe.num_parts,
        mesh=mesh,
        compute_bytes=compute_bytes,
    )
    return schedule_report(schedule) | {
        "mesh": mesh,
        "grad_accumulation": pipe.num_parts,
        "layers": pipe.stages.sizes,
        "loads": loads(pipe.stages.sizes, head_layers=pipe.task.head_layers),
        "per_device": {
            "activation_bytes": activation,
            "input_bytes": activation * schedule.num_input_slots,
            "deferred_bytes": pipe.deferred_bytes(rows=rows),
            "send_bytes": 2 * activation * schedule.num_ticks * pipe.num_parts,
        },
        "gather": {"chosen": pipe.gather, **costs},
    }


def _lines(report: dict[str, Any], pipe: Pipeline) -> Iterator[str]:
    told, gather = report["per_device"], report["gather"]
    parts = report["grad_accumulation"]
    yield f"mesh: {mesh_text(report['mesh'])}"
    yield (
        f"{report['schedule']}: {report['num_microbatches']} microbatches through "
        f"{report['num_stages']} stages"
        + (f", {report['virtual_stages']} chunks each" if report["virtual_stages"] > 1 else "")
        + (f", {parts} times a step" if parts > 1 else "")
    )
    yield ""
    yield from format_grid(pipe.schedule)
    yield ""
    yield (
        f"{report['ticks']} ticks; bubble {report['bubble']:.2%}: a step takes {report['cost']:g} "
        "forward passes of a microbatch through a stage (F 1, B 2, weight gradients 1)"
    )
    units = ", ".join(f"{n} {kind}" for kind, n in report["executed"].items() if n)
    yield f"units computed, all stages: {units}"
    yield f"layers of each virtual stage: {list(report['layers'])}"
    loads = [f"{load:.1f}" for load in report["loads"]]
    yield f"work of each, head included, in forward passes of a layer: {', '.join(loads)}"
    yield ""
    yield "per device:"
    held = [
        (told["input_bytes"], f"inputs of stages: {report['input_slots']} are kept at most"),
        (told["send_bytes"], "sent to neighbours in a step"),
    ]
    if report["deferred_slots"]:
        what = f"operands of {report['deferred_slots']} microbatches' weight gradients at most"
        held.append((told["deferred_bytes"], f"{what} (less where tensor divides them)"))
    for name in ("step", "microbatch") if report["mesh"]["fsdp"] > 1 else ():
        mark = ", as chosen" if name == gather["chosen"] else ""
        what = f"with pipeline.gather={name}{mark}"
        held.append((gather[name]["wire_bytes"], f"sent in a step to gather weights {what}"))
        held.append((gather[name]["held_bytes"], f"held in a step for weights, gradients {what}"))
    for count, meaning in held:
        yield f"{format_bytes(count):>12}  {meaning}"
