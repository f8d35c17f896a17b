"""What a search found, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from spmd_train.observe.columns import columns
from spmd_train.plan.answer import Plan
from spmd_train.plan.candidates import Candidate
from spmd_train.plan.estimate import Estimate
from spmd_train.plan.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the search's table.

    Attributes:
        candidate: the layout.
        estimate: by formulas.
        plan: by the compiler; None: not compiled, or it refused.
        seconds: of a step, by which rows are ordered: of the compiled program if there is one. On
            a CPU target it orders, but tells no time.
        verdict: why it won or lost.
    """

    candidate: Candidate
    estimate: Estimate
    plan: Plan | None
    seconds: float
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        rows: best first; the winner is the first if there is one.
        winner: compiled, and it fits; None if none of the compiled ones does.
        ranked: all candidates whose batch and model divide, in the order of the formulas: what they
            say fits, then the rest, each the fastest first.
        num_too_large: of them, those that formulas say do not fit.
    """

    rows: tuple[Row, ...]
    winner: Row | None
    ranked: tuple[tuple[Candidate, Estimate], ...]
    num_too_large: int

    @property
    def num_considered(self) -> int:
        """How many candidates there are."""
        return len(self.ranked)


def format_search(result: SearchResult, *, target: Target) -> Iterator[str]:
    """The table that people read, and the winner's overrides."""
    yield (
        f"{result.num_considered:,} layouts considered by formulas, {result.num_too_large:,} of "
        "them too large; the best were compiled:"
    )
    lines: list[tuple[str, ...]] = [("layout", "peak", "compiled step", "by formulas", "verdict")]
    for row in result.rows:
        peak = row.plan.needed_bytes if row.plan else row.estimate.peak_bytes
        steps = (row.seconds if row.plan else None), row.estimate.step
        told = ["unknown" if target.chip is None else f"{s:.4g} s" if s else "" for s in steps]
        lines.append((row.candidate.name, f"{peak / 2**30:.2f} GiB", *told, row.verdict))
    yield from columns(lines)
    if result.winner is None:
        yield "none of the compiled layouts fits: more devices, or a smaller batch"
        return
    yield ""
    yield "to use it:"
    yield " ".join(
        f"--config.{path}={value}" for path, value in result.winner.candidate.overrides.items()
    )


def search_as_json(result: SearchResult) -> list[dict[str, Any]]:
    """The table as JSON."""
    return [
        {
            "overrides": row.candidate.overrides,
            "estimate": dataclasses.asdict(row.estimate),
            "compiled": row.plan is not None,
            "fits": row.plan.fits if row.plan else None,
            "peak_bytes": row.plan.needed_bytes if row.plan else None,
            "step_seconds": row.plan.roofline.step if row.plan else None,
            "ordering_seconds": row.seconds,
            "verdict": row.verdict,
        }
        for row in result.rows
    ]
