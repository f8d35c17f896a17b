"""Which process holds the others up: every so many steps each tells what its steps took."""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import time
from collections.abc import Sequence

from spmd_train import cluster
from spmd_train.observe.clock import StepClock

NOTABLE = 0.2
"""Of a step: how much more than the others a process takes that is named."""
_LEAST_SECONDS = 1e-3

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """What a step of one process took, seconds, the mean of several.

    Attributes:
        host: its host's name.
        step: all of it.
        data: of it, waiting for a batch.
        device: of it, waiting for the devices, which wait for the other processes.
        barrier: how long it waited, at the end, for the last process to come.
    """

    host: str
    step: float
    data: float
    device: float
    barrier: float

    @property
    def own(self) -> float:
        """What the others had to wait for: all but the wait for the devices."""
        return self.step - self.device


def slowest(paces: Sequence[Pace]) -> tuple[int, float]:
    """The process that takes most longer than the others.

    Args:
        paces: of all processes, two or more.

    Returns:
        Its number, and its own seconds per step above the others' median.
    """
    own = [pace.own for pace in paces]
    excess = [
        mine - statistics.median(own[:number] + own[number + 1 :])
        for number, mine in enumerate(own)
    ]
    number = max(range(len(own)), key=lambda i: excess[i])
    return number, excess[number]


class Stragglers:
    """Compares the processes' paces, over the coordination service: no device takes part.

    A chip that is slow itself makes all processes wait for their devices alike, and is not told
    apart; a host with slow data, a busy processor or a stopped process is.
    """

    def __init__(self, clock: StepClock, *, every: int) -> None:
        """Looks at the clock from the first step on.

        Args:
            clock: of the loop.
            every: steps between comparisons; 0: never.
        """
        self._clock = clock
        self._every = every if cluster.connected() else 0
        self._last: tuple[int, float, float, float] | None = None

    def stepped(self, step: int) -> dict[str, float]:
        """To be called by every process after every step.

        Returns:
            For the metrics, where a comparison was made: `slowest_process`, `slowest_seconds` (its
            own time per step above the others' median), `barrier_seconds` (the longest wait for the
            last process); else nothing.
        """
        if not self._every:
            return {}
        if self._last is None:  # From the end of the first step, which compiled.
            self._last = (step, *self._clock.totals())
        if step % self._every or step == self._last[0]:
            return {}
        first, *before = self._last
        count = step - first
        now = self._clock.totals()  # Before the barrier, which would level who waits for whom.
        begin = time.monotonic()
        cluster.meet_again()
        barrier = time.monotonic() - begin
        spans = [(b - a) / count for a, b in zip(before, now, strict=True)]
        mine = Pace(
            host=cluster.host(), step=spans[0], data=spans[1], device=spans[2], barrier=barrier
        )
        paces = [
            Pace(**json.loads(t)) for t in cluster.tell_all(json.dumps(dataclasses.asdict(mine)))
        ]
        self._last = (step, *self._clock.totals())
        number, excess = slowest(paces)
        if excess > max(NOTABLE * paces[number].step, _LEAST_SECONDS) and cluster.is_leader():
            log.warning("%s", _sentence(paces, number, excess, step))
        return {
            "slowest_process": number,
            "slowest_seconds": excess,
            "barrier_seconds": max(pace.barrier for pace in paces),
        }


def _sentence(paces: Sequence[Pace], number: int, excess: float, step: int) -> str:
    slow = paces[number]
    return (
        f"step {step}: process {number} on {slow.host} is slow: {slow.own:.3f} s of its own in a "
        f"step ({slow.data:.3f} s of it waiting for data), {excess:.3f} s more than the others, "
        f"which wait for it; a step takes {slow.step:.3f} s"
    )
