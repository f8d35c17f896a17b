"""`spmd-train inspect shardings`: where every array of the train state lies, and why."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping

from spmd_train import experiment
from spmd_train.cli.formats import format_bytes
from spmd_train.cli.targets import devices_of
from spmd_train.inspect.shardings import ShardingTable, as_json, sharding_table
from spmd_train.observe.columns import columns
from spmd_train.parallel.mesh import mesh_text
from spmd_train.parallel.plan import LeafPlan


def run(args: argparse.Namespace) -> int:
    """Prints the plan of `args.config`; allocates and compiles nothing."""
    with devices_of(args) as (devices, _):
        program = experiment.build(args.config, devices=devices).program
    table, mesh = sharding_table(program.plans), dict(program.mesh.shape)
    if args.json:
        print(json.dumps(as_json(table, mesh=mesh), indent=2))
        return 0
    for line in format_table(table, mesh=mesh):
        print(line)
    return 0


def format_table(table: ShardingTable, *, mesh: Mapping[str, int]) -> Iterator[str]:
    """The lines that people read."""
    yield f"mesh: {mesh_text(mesh)}"
    yield ""
    heads = ("parameter", "shape", "dtype", "spec", "per device", "reason")
    yield from columns([heads, *map(_row, table.params)], right=(4,))
    yield ""
    heads = ("optimizer state", "arrays", "dtype", "per device", "reason")
    groups = [
        (
            group.path,
            str(group.total.num_arrays),
            "+".join(group.dtypes),
            format_bytes(group.total.bytes_per_device),
            group.reason,
        )
        for group in table.groups
    ]
    yield from columns([heads, *groups], right=(1, 3))
    yield ""
    totals = [
        (
            name,
            str(total.num_arrays),
            format_bytes(total.bytes),
            format_bytes(total.bytes_per_device),
        )
        for name, total in table.totals.items()
    ]
    yield from columns([("total", "arrays", "global", "per device"), *totals], right=(1, 2, 3))
    yield ""
    yield f"{table.num_params:,} parameters"


def _row(plan: LeafPlan) -> tuple[str, ...]:
    shape = ",".join(map(str, plan.shape))
    spec = ", ".join(
        "-" if axes is None else axes if isinstance(axes, str) else "+".join(axes)
        for axes in (*plan.spec, *[None] * (len(plan.shape) - len(plan.spec)))
    )
    per_device = format_bytes(plan.bytes_per_device)
    return plan.path, f"[{shape}]", plan.dtype, f"({spec})", per_device, plan.reason
