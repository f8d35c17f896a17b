"""What goodput.jsonl adds up to: shares of the wall time, attempts, lost work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

_STARTS = ("init", "restore", "compile")
KINDS: tuple[str, ...] = ("train", "data_wait", "eval", "save", "check", *_STARTS, "wasted", "down")
"""What the wall time went into: `wasted` is work that was done again, `down` when nothing ran."""

# Starting again is a cost of its own; only what the steps themselves took can be lost with them.
_OF_STEPS = ("train", "data_wait", "eval", "save", "check")


@dataclasses.dataclass(kw_only=True)
class Attempt:
    """One attempt.

    Attributes:
        number: from 1.
        start: seconds since 1970.
        end: its last sign of life.
        ended: `done`, an exception's name, or `killed`: it did not say (it may still run).
        first_step: steps done when it began.
        last_step: steps done at its last sign of life.
        down: seconds since the last sign of life of the attempt before.
        first_step_seconds: from then to this attempt's first finished step: what a crash costs
            besides lost work; None if there was no step.
    """

    number: int
    start: float
    end: float
    first_step: int
    last_step: int
    down: float = 0.0
    ended: str = "killed"
    first_step_seconds: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Account:
    """Where a run's time went.

    Attributes:
        seconds: by kind, one for each of `KINDS`; their sum is the wall time.
        attempts: oldest first.
        saves: seconds of training that each save took.
        wasted_steps: done and done again.
        rollbacks: returns to a checkpoint within an attempt.
    """

    seconds: Mapping[str, float]
    attempts: Sequence[Attempt]
    saves: Sequence[float]
    wasted_steps: int
    rollbacks: int

    @property
    def wall_seconds(self) -> float:
        """From the first attempt's start to the last sign of life."""
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        """Of the wall time, by kind."""
        return {kind: s / (self.wall_seconds or 1.0) for kind, s in self.seconds.items()}


@dataclasses.dataclass
class _Work:
    """What a line tells: the steps between two lines, and what they took."""

    start: int
    end: int
    spans: dict[str, float]


def account(lines: Sequence[Mapping[str, Any]]) -> Account:
    """Adds up the lines of a goodput.jsonl.

    Of the steps after the checkpoint that a later attempt (or a rollback) began from, everything is
    `wasted`; a line that lies across is divided evenly over its steps.

    Args:
        lines: of `read_goodput`.

    Returns:
        The account.
    """
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    attempts: list[Attempt] = []
    work: list[_Work] = []
    saves: list[float] = []
    wasted_steps = rollbacks = 0
    for line in lines:
        spans = {kind: float(s) for kind, s in line["spans"].items()}
        began_at = line["time"] - sum(spans.values())
        if not attempts or attempts[-1].number != line["attempt"]:
            # A clock that was set back must not make time negative.
            down = max(0.0, began_at - attempts[-1].end) if attempts else 0.0
            seconds["down"] += down
            first = line.get("begin", line["step"])
            attempts.append(
                Attempt(
                    number=line["attempt"],
                    start=began_at,
                    end=began_at,
                    first_step=first,
                    last_step=first,
                    down=down,
                )
            )
            fresh = True
        else:
            fresh = False
        attempt = attempts[-1]
        if "begin" in line:
            rollbacks += not fresh
            lost = _lose(work, after=line["begin"])
            wasted_steps += lost[0]
            seconds["wasted"] += lost[1]
            attempt.last_step = line["begin"]
        work.append(_Work(attempt.last_step, line["step"], spans))
        if attempt.first_step_seconds is None and line["step"] > attempt.last_step:
            attempt.first_step_seconds = line["time"] - attempt.start + attempt.down
        if "saved" in line:
            saves.append(spans.get("save", 0.0))
        attempt.end, attempt.last_step = line["time"], line["step"]
        attempt.ended = line.get("end", "killed")
    for part in work:
        for kind, taken in part.spans.items():
            seconds[kind] = seconds.get(kind, 0.0) + taken
    return Account(
        seconds=seconds,
        attempts=attempts,
        saves=saves,
        wasted_steps=wasted_steps,
        rollbacks=rollbacks,
    )


def _lose(work: list[_Work], *, after: int) -> tuple[int, float]:
    """Takes what was done after a step out of `work`; the steps and seconds lost."""
    steps, seconds = 0, 0.0
    for part in reversed(work):
        if part.end <= after:
            break
        kept = max(part.start, after)
        share = (part.end - kept) / (part.end - part.start) if part.end > part.start else 1.0
        steps += part.end - kept
        for kind in _OF_STEPS:
            if kind in part.spans:
                seconds += share * part.spans[kind]
                part.spans[kind] *= 1 - share
        # What is lost is not lost again by the next crash.
        part.start, part.end = min(part.start, after), min(part.end, after)
    return steps, seconds
