"""The pipeline schedules by name, and a table as the program reads it. No JAX here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from spmd_train.parallel.schedule_table import RECOMPUTED, Cell, Schedule, Unit


def _table(
    num_stages: int,
    forward: Iterable[tuple[int, int, Unit]],
    backward: Iterable[tuple[int, int, Unit]] = (),
) -> list[list[Cell]]:
    """Cells from (tick, device, unit)."""
    forward, backward = list(forward), list(backward)
    last = max(tick for tick, _, _ in (*forward, *backward))
    grid = [[Cell()] * num_stages for _ in range(last + 1)]
    for tick, device, unit in forward:
        grid[tick][device] = grid[tick][device]._replace(forward=unit)
    for tick, device, unit in backward:
        grid[tick][device] = grid[tick][device]._replace(backward=unit)
    return grid


def _frozen(grid: list[list[Cell]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(tuple(row) for row in grid)


def _streams(
    p: int, m: int, v: int, *, start: int | None
) -> tuple[list[tuple[int, int, Unit]], list[tuple[int, int, Unit]]]:
    """The F stream, and the B stream that is its mirror image from tick `start` on.

    Units go through a device in groups of P microbatches, chunk after chunk, so that each comes
    back to device 0 just when the group before it has left the way free (Narayanan et al.,
    arXiv:2104.04473). With V = 1 the order is that of the microbatches; with more, a last group of
    fewer than P leaves holes.
    """
    groups = [Unit(g + r, c) for g in range(0, m, p) for c in range(v) for r in range(p)]
    order = [(i, unit) for i, unit in enumerate(groups) if unit.microbatch < m]
    forward = [(s + i, s, unit) for s in range(p) for i, unit in order]
    if start is None:
        return forward, []
    backward = [
        (start + p - 1 - s + i, s, Unit(unit.microbatch, v - 1 - unit.chunk))
        for s in range(p)
        for i, unit in order
    ]
    return forward, backward


def _gpipe(p: int, m: int, v: int) -> Schedule:
    """All forwards, then all backwards (Huang et al., arXiv:1811.06965)."""
    assert v == 1
    return Schedule("gpipe", p, m, v, _frozen(_table(p, *_streams(p, m, v, start=m + p - 1))))


def _one_f_one_b(p: int, m: int, v: int) -> Schedule:
    """A backward as soon as there can be one (Narayanan et al., arXiv:1806.03377)."""
    assert v == 1
    return Schedule("1f1b", p, m, v, _frozen(_table(p, *_streams(p, m, v, start=p - 1))))


def _interleaved(p: int, m: int, v: int) -> Schedule:
    """V chunks on each device: a V-th of the bubble (Narayanan et al., arXiv:2104.04473)."""
    grid = _table(p, *_streams(p, m, v, start=v * p - 1))
    return Schedule("interleaved", p, m, v, _frozen(grid))


def _zero_bubble(p: int, m: int, v: int) -> Schedule:
    """1f1b with the weight gradients moved to where a device would wait (ZB-H1).

    Qi et al., arXiv:2401.10241. F and B lie as in 1f1b. A device does waiting W's wherever the tick
    takes longer than its own F and B anyway; some ticks are made longer for one or two more. Which,
    is tried: the cheapest table wins, and among equals the one that keeps the least waiting.
    """
    assert v == 1
    bare = _table(p, *_streams(p, m, v, start=p - 1))
    full = range(p - 1, m + p - 1)
    candidates = []
    for skipped in sorted({min(k * (p - 1) // 2, m) for k in range(9)}):
        for drain in range(3):
            longer = [0] * len(bare)
            for tick in full[skipped:]:
                longer[tick] = 1
            for tick in range(m + p - 1, len(bare)):
                longer[tick] = drain
            candidates.append(Schedule("zero_bubble", p, m, v, _with_weights(bare, longer), True))
    return min(candidates, key=lambda s: (s.cost(), s.num_deferred_slots, s.num_ticks))


def _with_weights(bare: list[list[Cell]], longer: list[int]) -> tuple[tuple[Cell, ...], ...]:
    """Fills in W's, in the order of the B's, each as soon as its device has time.

    Args:
        bare: F and B.
        longer: for each tick, by how many W's more it may take; ticks are added at the end.
    """
    f, b, w = RECOMPUTED
    grid = [list(row) for row in bare]
    waiting: list[list[Unit]] = [[] for _ in grid[0]]
    tick = 0
    while tick < len(bare) or any(waiting):
        if tick == len(grid):
            grid.append([Cell()] * len(waiting))
        row = grid[tick]
        busy = [(c.forward is not None) * f + (c.backward is not None) * b for c in row]
        budget = max(busy) + w * (longer[tick] if tick < len(bare) else 1)
        for device, cell in enumerate(row):
            if cell.backward is not None:
                waiting[device].append(cell.backward)
            room = int((budget - busy[device]) / w)
            row[device] = cell._replace(weights=tuple(waiting[device][:room]))
            del waiting[device][:room]
        tick += 1
    return _frozen(grid)


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved": _interleaved,
    "zero_bubble": _zero_bubble,
}


def make_schedule(
    name: str, *, num_stages: int, num_microbatches: int, num_chunks: int = 1
) -> Schedule:
    """The table of a schedule.

    Args:
        name: a key of `SCHEDULES`.
        num_stages: P, devices along the pipeline.
        num_microbatches: M; with several chunks best a multiple of P.
        num_chunks: V; only `interleaved` takes more than 1.

    Returns:
        A table that passes `Schedule.check`.
    """
    return SCHEDULES[name](num_stages, num_microbatches, num_chunks)


def forward_only(*, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The F's alone: for evaluation. M+P-1 ticks with one chunk, M V+P-1 with V."""
    p, m, v = num_stages, num_microbatches, num_chunks
    forward, _ = _streams(p, m, v, start=None)
    return Schedule("forward", p, m, v, _frozen(_table(p, forward)))


class Columns(NamedTuple):
    """A table as the program reads it: int32 [ticks, devices] each; in a tick, a device's scalars.

    Attributes:
        forward: 1 where there is an F, else 0.
        backward: the same for B.
        forward_microbatch: of the F; 0 where there is none, here and below.
        backward_microbatch: of the B.
        forward_chunk: of the F.
        backward_chunk: of the B.
        forward_slot: where the F keeps its input.
        backward_slot: where the B finds it.
        first_weights: microbatch of the first W.
        num_weights: how many W's, of consecutive microbatches.
    """

    forward: Any
    backward: Any
    forward_microbatch: Any
    backward_microbatch: Any
    forward_chunk: Any
    backward_chunk: Any
    forward_slot: Any
    backward_slot: Any
    first_weights: Any
    num_weights: Any


def columns(schedule: Schedule) -> Columns:
    """The table as arrays."""
    shape = schedule.num_ticks, schedule.num_stages
    table = Columns(*(np.zeros(shape, np.int32) for _ in Columns._fields))
    for tick, device, cell in schedule.cells():
        at = tick, device
        if cell.forward is not None:
            table.forward[at] = 1
            table.forward_microbatch[at], table.forward_chunk[at] = cell.forward
            table.forward_slot[at] = schedule.input_slots[device, cell.forward]
        if cell.backward is not None:
            table.backward[at] = 1
            table.backward_microbatch[at], table.backward_chunk[at] = cell.backward
            table.backward_slot[at] = schedule.input_slots[device, cell.backward]
        if cell.weights:
            table.first_weights[at] = cell.weights[0].microbatch
            table.num_weights[at] = len(cell.weights)
    return table
