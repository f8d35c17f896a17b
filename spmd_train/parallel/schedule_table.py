"""A pipeline schedule as a table: which device does what in which tick. No JAX here.

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
from collections.abc import Iterator
from typing import NamedTuple


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
