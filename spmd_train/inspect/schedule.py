"""A pipeline schedule for people: its grid as text, its picture as SVG, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from spmd_train.observe.columns import columns
from spmd_train.parallel.plan import LeafPlan
from spmd_train.parallel.rules import dims_of
from spmd_train.parallel.schedule_table import RECOMPUTED, Cell, Schedule, Unit
from spmd_train.parallel.stages import AXIS, Stages

_COLORS = {"F": "#7aa6da", "B": "#8cc28c", "W": "#e3b067", "": "#ededed"}
_UNIT, _LANE, _LEFT, _TOP = 26, 34, 64, 40


def schedule_report(schedule: Schedule) -> dict[str, Any]:
    """What a table counts.

    Returns:
        `schedule`, `num_stages`, `num_microbatches`, `virtual_stages`, `ticks`; `cost`, in forward
        passes of one microbatch through one device's layers, and `bubble`, the part of it that a
        device waits; `executed` units over all devices; `input_slots` and `deferred_slots` that a
        device needs; `grid`: for each tick and device `[F, B, [W, ...]]`, a unit being
        `[microbatch, chunk]` or null.
    """
    return {
        "schedule": schedule.name,
        "num_stages": schedule.num_stages,
        "num_microbatches": schedule.num_microbatches,
        "virtual_stages": schedule.num_chunks,
        "ticks": schedule.num_ticks,
        "cost": schedule.cost(),
        "bubble": schedule.bubble(),
        "executed": schedule.executed(),
        "input_slots": schedule.num_input_slots,
        "deferred_slots": schedule.num_deferred_slots,
        "grid": [[[c.forward, c.backward, c.weights] for c in row] for row in schedule.grid],
    }


def format_grid(schedule: Schedule) -> Iterator[str]:
    """The grid: a line per tick, a column per device; `F3` is microbatch 3, `F3'` in chunk 1."""
    heads = ["tick", *(f"stage {s}" for s in range(schedule.num_stages))]
    rows = [[str(tick), *map(_text, row)] for tick, row in enumerate(schedule.grid)]
    yield from columns([heads, *rows], right=(0,))


def _text(cell: Cell) -> str:
    parts = [f"{kind}{_name(unit)}" for kind, unit in _units(cell)]
    return " ".join(parts) or "."


def _units(cell: Cell) -> list[tuple[str, Unit]]:
    units = [("F", cell.forward), ("B", cell.backward), *(("W", unit) for unit in cell.weights)]
    return [(kind, unit) for kind, unit in units if unit is not None]


def _name(unit: Unit) -> str:
    return f"{unit.microbatch}{chr(39) * unit.chunk}"


def schedule_svg(schedule: Schedule) -> str:
    """A picture: a lane per device, time to the right, a tick as long as its busiest device."""
    costs = RECOMPUTED
    times = {
        "F": costs.forward,
        "B": costs.backward + (0 if schedule.splits_backward else costs.weights),
        "W": costs.weights,
    }
    times = {kind: time / schedule.num_chunks for kind, time in times.items()}
    scale = _UNIT * schedule.num_chunks
    boxes: list[str] = []
    start = 0.0
    for row in schedule.grid:
        busy = [sum(times[kind] for kind, _ in _units(cell)) for cell in row]
        for device, cell in enumerate(row):
            left = start
            for kind, unit in _units(cell):
                boxes.append(_box(left * scale, device, times[kind] * scale, kind, unit))
                left += times[kind]
            if left < start + max(busy):
                boxes.append(
                    _box(left * scale, device, (start + max(busy) - left) * scale, "", None)
                )
        start += max(busy)
    names = [
        f'<text x="{_LEFT - 8}" y="{_TOP + s * _LANE + 20}" text-anchor="end">stage {s}</text>'
        for s in range(schedule.num_stages)
    ]
    title = (
        f"{schedule.name}: {schedule.num_stages} stages, {schedule.num_microbatches} microbatches"
        f"{f', {schedule.num_chunks} chunks each' if schedule.num_chunks > 1 else ''}; "
        f"{schedule.num_ticks} ticks, bubble {schedule.bubble():.1%}"
    )
    width = _LEFT + start * scale + 12
    height = _TOP + schedule.num_stages * _LANE + 12
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
            f'width="{width:.0f}" height="{height}" font-family="sans-serif" font-size="11">',
            f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
            f'<text x="12" y="22" font-size="14">{title}</text>',
            *names,
            *boxes,
            "</svg>\n",
        ]
    )


def _box(x: float, device: int, width: float, kind: str, unit: Unit | None) -> str:
    left, top = _LEFT + x, _TOP + device * _LANE
    opacity = 1.0 if unit is None else max(1 - 0.3 * unit.chunk, 0.3)
    box = (
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_LANE - 6}" '
        f'fill="{_COLORS[kind]}" fill-opacity="{opacity:.2f}" stroke="white"/>'
    )
    if unit is None:
        return box
    return box + (
        f'<text x="{left + width / 2:.1f}" y="{top + 18}" text-anchor="middle">'
        f"{kind}{_name(unit)}</text>"
    )


def gather_costs(
    plans: Mapping[str, LeafPlan],
    *,
    stack: str,
    schedule: Schedule,
    stages: Stages,
    num_parts: int,
    mesh: Mapping[str, int],
    compute_bytes: int,
) -> dict[str, dict[str, int]]:
    """What `pipeline.gather` costs a device, either way.

    Counted are the stage's layers that are sharded over `fsdp`. Gradients come back as a
    reduce-scatter; where XLA makes it an all-reduce and a slice, those bytes double.

    Args:
        plans: of the parameters.
        stack: where the layers are among them.
        schedule: the table.
        stages: which layers lie where.
        num_parts: accumulation parts of a step.
        mesh: sizes of the axes.
        compute_bytes: of a value in the compute dtype.

    Returns:
        For `step` and `microbatch`: `wire_bytes` that a device sends in a step (ring algorithms),
        and `held_bytes` that it keeps through the step for weights and gradients.
    """
    size, values = mesh["fsdp"], 0
    gathered = ("fsdp", "context", AXIS)
    for path, plan in plans.items():
        dims = dims_of(plan.spec, ndim=len(plan.shape))
        axes = [a for dim in dims for a in dim]
        if path.split("/")[0] == stack and "fsdp" in axes:
            kept = math.prod(mesh[a] for a in axes if a not in gathered)
            layers = max(stages.sizes) * stages.num_chunks
            values += math.prod(plan.shape[1:]) * layers // kept
    uses = schedule.num_microbatches * num_parts
    moved = values * (size - 1) // size
    return {
        "step": {
            "wire_bytes": moved * (compute_bytes + 4),
            "held_bytes": values * (compute_bytes + 4) if size > 1 else 0,
        },
        "microbatch": {
            # F and B gather anew, B brings gradients back.
            "wire_bytes": moved * compute_bytes * 3 * uses,
            "held_bytes": values // size * (compute_bytes + 4) if size > 1 else 0,
        },
    }
