"""`spmd-train inspect context`: how a split sequence shares out attention's work."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from typing import Any

from spmd_train import experiment
from spmd_train.inspect.context import context_report


def run(args: argparse.Namespace) -> int:
    """Prints the work and the bytes of `args.config`; compiles nothing."""
    config = args.config
    layout = experiment.build(config).program.layout
    microbatch = config.train.global_batch_size // config.train.grad_accumulation
    report = context_report(
        config.model,
        layout,
        length=config.data.sequence_length,
        rows=microbatch // layout.size(layout.axes("batch")),
        passes=config.train.grad_accumulation,
    )
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for line in format_report(report):
        print(line)
    return 0


def format_report(report: Mapping[str, Any]) -> Iterator[str]:
    """The lines that people read."""
    if report["devices"] == 1:
        yield "mesh.context is 1: sequences are not split, and attention sends nothing"
        return
    yield (
        f"{report['method']}, {report['placement']}: {report['sequence_length']:,} tokens on "
        f"{report['devices']} devices, {report['tokens_per_device']:,} each"
    )
    yield ""
    yield f"{'device':>6}  {'blocks':<9}{'visible pairs':>20}{'computed pairs':>20}"
    for i, (blocks, visible, computed) in enumerate(
        zip(report["blocks"], report["visible_pairs"], report["computed_pairs"], strict=True)
    ):
        told = ", ".join(map(str, blocks))
        yield f"{i:>6}  {told:<9}{visible:>20,}{computed:>20,}"
    yield ""
    yield f"imbalance (most / mean): visible {report['imbalance']:.3f}, " + (
        f"computed {report['computed_imbalance']:.3f}, with devices waiting for each other at "
        f"every step {report['ring_imbalance']:.3f}"
    )
    sent = report["layer_bytes"]
    yield (
        f"a device sends {sent['forward']:,} bytes forward and {sent['backward']:,} backward per "
        f"layer and microbatch; {report['step_bytes']:,} per step"
    )
