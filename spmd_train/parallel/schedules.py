"""Pipeline schedules as tables: which device does what in which tick. No JAX here.

A *virtual stage* is a run of layers; with P devices and V chunks on each there are K = P V of them,
and virtual stage k lies on device k mod P as its chunk k // P. A *unit* is one microbatch in one
chunk. In a tick every device may run

- F: a forward unit,
- B: a backward unit: the chunk is recomputed from its input, and the gradient taken;
- W: the weight gradients that a `zero_bubble` B has left for later.

What a tick makes for a neighbour is there in the next one, and is used in it. All devices go from
tick to tick together, so a tick takes as long as its busiest device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Unit(NamedTuple):
    """One microbatch in one chunk of a device's layers."""

    microbatch: int
    chunk: int


class Cell(NamedTuple):
    """What a device does in a tick, in this order."""

    forward: Unit | None = None
    backward: Unit | None = None
    weights: tuple[Unit, ...] = ()


class Costs(NamedTuple):
    """Time of a unit of a whole device's layers; a chunk of V takes a V-th. Any unit of time.

    Attributes:
        forward: of an F.
        backward: of a B, without the weight gradients.
        weights: of the weight gradients, in B or in W.
    """

    forward: float = 1.0
    backward: float = 2.0
    weights: float = 1.0


RECOMPUTED = Costs()
"""A B makes the forward pass again, so that it costs two: what the program does."""

KEPT = Costs(1.0, 1.0, 1.0)
"""Every activation is kept: the costs of the papers."""


class ScheduleError(ValueError):
    """A table that cannot be run."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table of ticks.

    Attributes:
        name: how the config calls it.
        num_stages: P, devices along the pipeline.
        num_microbatches: M.
        num_chunks: V, virtual stages per device.
        grid: a row per tick, a cell per device.
        splits_backward: B leaves the weight gradients to W.
    """

    name: str
    num_stages: int
    num_microbatches: int
    num_chunks: int
    grid: tuple[tuple[Cell, ...], ...]
    splits_backward: bool = False

    @property
    def num_ticks(self) -> int:
        """Rows of the table."""
        return len(self.grid)

    def cells(self) -> Iterator[tuple[int, int, Cell]]:
        """Tick, device and cell, tick by tick."""
        for tick, row in enumerate(self.grid):
            for device, cell in enumerate(row):
                yield tick, device, cell

    def is_first(self, device: int, unit: Unit) -> bool:
        """Whether the unit is of the first virtual stage, the one that embeds."""
        return device == 0 and unit.chunk == 0

    def is_last(self, device: int, unit: Unit) -> bool:
        """Whether the unit is of the last virtual stage, the one with the head and the loss."""
        return device == self.num_stages - 1 and unit.chunk == self.num_chunks - 1

    def _cell_cost(self, cell: Cell, costs: Costs) -> float:
        backward = costs.backward + (0 if self.splits_backward else costs.weights)
        return (
            (cell.forward is not None) * costs.forward
            + (cell.backward is not None) * backward
            + len(cell.weights) * costs.weights
        ) / self.num_chunks

    def cost(self, costs: Costs = RECOMPUTED) -> float:
        """Time of the whole table: each tick takes as long as its busiest device.

        The F of the last virtual stage is counted as every F, though it merely keeps its input (its
        B computes it): that time is left to the head, which only that stage has.
        """
        return sum(max(self._cell_cost(c, costs) for c in row) for row in self.grid)

    def bubble(self, costs: Costs = RECOMPUTED) -> float:
        """The part of the time in which a device waits, 0 to 1; the same for all devices."""
        work = sum(self._cell_cost(c, costs) for row in self.grid for c in row)
        return 1 - work / self.num_stages / self.cost(costs)

    def executed(self) -> dict[str, int]:
        """How many units compute layers, over all devices: `forward`, `backward`, `weights`."""
        cells = [(device, cell) for _, device, cell in self.cells()]
        return {
            "forward": sum(
                c.forward is not None and not self.is_last(d, c.forward) for d, c in cells
            ),
            "backward": sum(c.backward is not None for _, c in cells),
            "weights": sum(len(c.weights) for _, c in cells),
        }

    @functools.cached_property
    def input_slots(self) -> dict[tuple[int, Unit], int]:
        """Where each device keeps the input of each unit between its F and its B."""
        slots: dict[tuple[int, Unit], int] = {}
        for device in range(self.num_stages):
            free: list[int] = []
            used = 0
            for row in self.grid:
                cell = row[device]
                if cell.forward is not None:
                    if not free:
                        free, used = [used], used + 1
                    slots[device, cell.forward] = free.pop()
                if cell.backward is not None and (device, cell.backward) in slots:
                    free.append(slots[device, cell.backward])
        return slots

    @property
    def num_input_slots(self) -> int:
        """Stage inputs that a device has room for."""
        return 1 + max(self.input_slots.values())

    @property
    def num_deferred_slots(self) -> int:
        """Microbatches whose weight gradients may wait on a device; 0 where B makes them."""
        most = 0
        for device in range(self.num_stages):
            waiting = 0
            for row in self.grid:
                waiting += self.splits_backward and row[device].backward is not None
                most = max(most, waiting)
                waiting -= len(row[device].weights)
        return most

    def check(self) -> None:
        """Makes sure that the table computes the gradient.

        Raises:
            ScheduleError: a unit is missing or done twice; B comes before F, or W before B; what a
                neighbour sends is not used in the very next tick; a place is overwritten while
                what it holds is needed; deferred weight gradients are not taken in order.
        """
        devices, chunks = self.num_stages, self.num_chunks
        forward: dict[tuple[int, int], int] = {}
        backward: dict[tuple[int, int], int] = {}
        weights: dict[tuple[int, int], int] = {}
        for tick, device, cell in self.cells():
            for units, times in (
                ([cell.forward], forward),
                ([cell.backward], backward),
                (cell.weights, weights),
            ):
                for unit in units:
                    if unit is None:
                        continue
                    stage = unit.chunk * devices + device
                    if (unit.microbatch, stage) in times:
                        raise ScheduleError(f"tick {tick}: {unit} twice on device {device}")
                    times[unit.microbatch, stage] = tick
        wanted = {(m, k) for m in range(self.num_microbatches) for k in range(devices * chunks)}
        for name, times, due in (
            ("F", forward, wanted),
            ("B", backward, wanted),
            ("W", weights, wanted if self.splits_backward else set()),
        ):
            if set(times) != due:
                raise ScheduleError(f"{name}: missing or extra units {set(times) ^ due}")
        for m, k in wanted:
            if k and forward[m, k] != forward[m, k - 1] + 1:
                raise ScheduleError(f"F of microbatch {m}: stage {k} not right after {k - 1}")
            if k and backward[m, k - 1] != backward[m, k] + 1:
                raise ScheduleError(f"B of microbatch {m}: stage {k - 1} not right after {k}")
            if backward[m, k] < forward[m, k]:
                raise ScheduleError(f"microbatch {m}, stage {k}: B before F")
            if self.splits_backward and weights[m, k] < backward[m, k]:
                raise ScheduleError(f"microbatch {m}, stage {k}: W before B")
        self._check_slots()

    def _check_slots(self) -> None:
        held: dict[tuple[int, int], Unit] = {}
        waiting: dict[int, list[Unit]] = {d: [] for d in range(self.num_stages)}
        for tick, device, cell in self.cells():
            if cell.forward is not None:
                place = device, self.input_slots[device, cell.forward]
                if place in held:
                    raise ScheduleError(f"tick {tick}: {held[place]} overwritten at {place}")
                held[place] = cell.forward
            if cell.backward is not None:
                place = device, self.input_slots[device, cell.backward]
                if held.pop(place) != cell.backward:
                    raise ScheduleError(f"tick {tick}: the input of {cell.backward} is lost")
                if self.splits_backward:
                    waiting[device].append(cell.backward)
            for unit in cell.weights:
                if waiting[device].pop(0) != unit:
                    raise ScheduleError(f"tick {tick}: W of {unit} out of order")


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
    for skipped in range(0, min(4 * (p - 1), m) + 1, max(1, (p - 1) // 2)):
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
    """A table as the program reads it: int32 [ticks, devices] each.

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

    forward: np.ndarray
    backward: np.ndarray
    forward_microbatch: np.ndarray
    backward_microbatch: np.ndarray
    forward_chunk: np.ndarray
    backward_chunk: np.ndarray
    forward_slot: np.ndarray
    backward_slot: np.ndarray
    first_weights: np.ndarray
    num_weights: np.ndarray


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
