"""What looks wrong in a plan: each lint has a name, under which `plan.silence` silences it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spmd_train.config import ExperimentConfig
from spmd_train.parallel.rules import axes_of
from spmd_train.plan.compiled import CompiledStep
from spmd_train.plan.hlo_cost import ProgramCost
from spmd_train.plan.targets import Target

_LARGE = 2**24
"""Bytes per device from which on a replicated parameter is worth a word."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lint:
    """Something that looks wrong.

    Attributes:
        name: to silence it by.
        message: what, where and how much.
    """

    name: str
    message: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Seen:
    config: ExperimentConfig
    program: Any
    step: CompiledStep | None
    cost: ProgramCost | None
    target: Target


def find_lints(
    config: ExperimentConfig,
    *,
    program: Any,
    step: CompiledStep | None,
    cost: ProgramCost | None,
    target: Target,
) -> list[Lint]:
    """Runs all lints but those of `plan.silence`.

    Args:
        config: of the experiment.
        program: a `Program`.
        step: its compiled step; None: only the lints on the plan run.
        cost: what the step executes.
        target: what it is for.
    """
    seen = _Seen(config=config, program=program, step=step, cost=cost, target=target)
    return [
        Lint(name=name, message=message)
        for name, lint in LINTS.items()
        if name not in config.plan.silent
        for message in lint(seen)
    ]


def _replicated_parameter(seen: _Seen) -> Iterator[str]:
    if seen.program.mesh.size == 1:
        return
    for path, plan in seen.program.plans.items():
        if path.startswith("params/") and not axes_of(plan.spec) and plan.bytes >= _LARGE:
            yield (
                f"{path.removeprefix('params/')} {plan.shape} is whole on every device: "
                f"{plan.bytes:,} bytes ({plan.reason}); shard it by sharding.rules or "
                "sharding.overrides"
            )


def _unused_axis(seen: _Seen) -> Iterator[str]:
    used = {axis for plan in seen.program.plans.values() for axis in axes_of(plan.spec)}
    for array in seen.program.abstract_batch.values():
        used |= set(axes_of(array.sharding.spec))
    for axis, size in seen.program.mesh.shape.items():
        if size > 1 and axis not in used:
            yield (
                f"mesh axis {axis} of size {size} shards nothing: its devices do the same work; "
                f"set mesh.{axis}=1"
            )


def _reshard_in_scan(seen: _Seen) -> Iterator[str]:
    ops = ("all-to-all", "collective-permute")
    found: dict[tuple[str, str, str], int] = {}
    for c in seen.step.collectives if seen.step else ():
        manual = c.source.startswith(("ppermute", "all_to_all", "ragged_all_to_all"))
        if c.op in ops and "blocks" in c.scope and (c.count or 0) > 1 and not manual:
            key = (c.op, "+".join(c.axes), c.scope)
            found[key] = found.get(key, 0) + (c.wire_bytes or 0)
    for (op, axes, scope), wire in found.items():
        yield (
            f"XLA reshards inside the layers: {op} over {axes} in {scope}, {wire:,} wire bytes a "
            "step; two sharding constraints disagree"
        )


def _gathered_optimizer(seen: _Seen) -> Iterator[str]:
    for c in seen.step.collectives if seen.step else ():
        if c.op == "all-gather" and c.scope.startswith("optimizer") and c.bytes_each >= _LARGE:
            yield (
                f"an optimizer state is gathered whole: {c.bytes_each:,} bytes over "
                f"{'+'.join(c.axes)} in {c.scope}"
            )


def _slow_network_per_layer(seen: _Seen) -> Iterator[str]:
    layers = seen.config.model.num_layers
    wire: dict[tuple[str, str], int] = {}
    for c in seen.step.collectives if seen.step else ():
        if c.network == "dcn" and (c.count or 0) >= layers > 1 and c.bytes_each >= 2**16:
            key = (c.op, "+".join(c.axes))
            wire[key] = wire.get(key, 0) + (c.wire_bytes or 0)
    for (op, axes), num_bytes in wire.items():
        yield (
            f"{op} over {axes} crosses the network between slices or nodes in every layer: "
            f"{num_bytes:,} wire bytes a step; put only data or replica across (mesh.dcn)"
        )


def _float32_matmul(seen: _Seen) -> Iterator[str]:
    if seen.cost is None or seen.target.platform == "cpu":
        return
    by_dtype = seen.cost.flops_by("dtype")
    share = by_dtype.get("f32", 0.0) / max(sum(by_dtype.values()), 1.0)
    if share < 0.01:
        return
    scopes = [op for op in seen.cost.operations if op.dtype == "f32"]
    worst = max(scopes, key=lambda op: op.flops * op.count)
    yield (
        f"{share:.1%} of the matmul FLOPs take float32 operands, most in {worst.scope or 'entry'}; "
        "the hardware is faster in bfloat16 (model.compute_dtype)"
    )


def _grows_with_depth(seen: _Seen) -> Iterator[str]:
    layers = seen.config.model.num_layers
    if seen.step is None or layers < 4 or seen.config.model.scan_unroll >= layers:
        return
    in_blocks = [c for c in seen.step.collectives if "blocks" in c.scope]
    once = [c for c in in_blocks if c.count == 1]
    shapes = {(c.op, c.bytes_each) for c in once}
    if shapes and len(once) >= layers * max(1, math.ceil(len(shapes) / 2)):
        yield (
            f"{len(once)} collectives of the layers run once each: the layers are not a loop, and "
            "the program grows with depth"
        )


LINTS: Mapping[str, Callable[[_Seen], Iterator[str]]] = {
    "replicated-parameter": _replicated_parameter,
    "unused-axis": _unused_axis,
    "reshard-in-scan": _reshard_in_scan,
    "gathered-optimizer-state": _gathered_optimizer,
    "slow-network-per-layer": _slow_network_per_layer,
    "float32-matmul": _float32_matmul,
    "grows-with-depth": _grows_with_depth,
}
"""Name, of `config.schema.LINTS`, to lint; each gives messages."""
