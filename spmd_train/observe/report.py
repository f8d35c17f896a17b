"""A run's report: what goodput.jsonl and metrics.jsonl say, as JSON, text and one HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import html
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from spmd_train.config import ConfigError
from spmd_train.observe.account import Account, account
from spmd_train.observe.goodput import NAME, read_goodput
from spmd_train.observe.html import COLORS, line_chart, page, stacked_bar
from spmd_train.observe.jsonl import read_jsonl, strict_json
from spmd_train.observe.stragglers import NOTABLE

_TOLD = {
    "train": "training steps that count",
    "data_wait": "waiting for batches",
    "eval": "evaluation, samples",
    "save": "stalled by saves",
    "check": "comparing copies of the state",
    "init": "starting, data, other hosts",
    "restore": "restoring, or initialization",
    "compile": "tracing and compiling",
    "wasted": "steps done again",
    "down": "nothing ran",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """A run, as its files tell it.

    Attributes:
        workdir: of the run.
        account: where the time went.
        metrics: lines of metrics.jsonl.
    """

    workdir: Path
    account: Account
    metrics: Sequence[Mapping[str, Any]]


def read_report(workdir: Path) -> Report:
    """Reads a run's files.

    Raises:
        ConfigError: there is no goodput.jsonl, or it holds nothing.
    """
    lines = read_goodput(Path(workdir) / NAME)
    if not lines:
        raise ConfigError(f"--workdir={workdir}: has no {NAME} to report on; train writes it")
    path = Path(workdir) / "metrics.jsonl"
    read = read_jsonl(path) if path.is_file() else []
    metrics = [m for m in read if type(m["step"]) is int and m["step"] < 2**53]
    return Report(workdir=Path(workdir), account=account(lines), metrics=metrics)


def _strict(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {k: strict_json(v) if isinstance(v, float) else v for k, v in metrics.items()}


def as_document(report: Report) -> dict[str, Any]:
    """The report as JSON: seconds and shares by kind, attempts, saves, the last metrics."""
    time = report.account
    saves = time.saves
    last = {
        split: next((_strict(m) for m in reversed(report.metrics) if m.get("split") == split), None)
        for split in ("train", "eval")
    }
    return {
        "workdir": str(report.workdir),
        "wall_seconds": time.wall_seconds,
        "goodput": time.shares["train"],
        "seconds": dict(time.seconds),
        "shares": time.shares,
        "attempts": [dataclasses.asdict(attempt) for attempt in time.attempts],
        "restarts": len(time.attempts) - 1,
        "rollbacks": time.rollbacks,
        "wasted_steps": time.wasted_steps,
        "saves": {
            "count": len(saves),
            "mean_seconds": sum(saves) / len(saves) if saves else None,
            "max_seconds": max(saves, default=None),
            "share_of_training": _save_share(time),
        },
        "first_step_seconds_median": _first_step_seconds(time),
        "slow_processes": _slow(report.metrics),
        "last": last,
    }


def _first_step_seconds(time: Account) -> float | None:
    """From an attempt's last sign of life to the next one's first step; the median."""
    taken = [a.first_step_seconds for a in time.attempts[1:] if a.first_step_seconds is not None]
    return statistics.median(taken) if taken else None


def _slow(metrics: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Processes that held the others up: in how many comparisons, and by how many seconds a step.

    A comparison counts as in the log, where the excess is over a fifth of the step.
    """
    excess: dict[str, list[float]] = {}
    for line in metrics:
        names = ("slowest_process", "slowest_seconds", "step_seconds")
        number, seconds, step = (line.get(name) for name in names)
        if type(number) is not int or not (_is_number(seconds) and _is_number(step)):
            continue
        if seconds > NOTABLE * step:
            excess.setdefault(str(number), []).append(seconds)
    return {
        number: {"times": len(found), "mean_seconds": statistics.fmean(found)}
        for number, found in sorted(excess.items(), key=lambda item: -len(item[1]))
    }


def _save_share(time: Account) -> float:
    """Of the time in which steps were made, how much saves have stalled."""
    return time.seconds["save"] / (
        sum(time.seconds[k] for k in ("train", "data_wait", "save")) or 1.0
    )


def as_text(report: Report) -> Iterator[str]:
    """The report as lines of text."""
    time = report.account
    steps = (time.attempts[0].first_step, time.attempts[-1].last_step)
    yield (
        f"{report.workdir}: steps {steps[0]} to {steps[1]} in {_span(time.wall_seconds)}, "
        f"{len(time.attempts)} attempt(s), {time.rollbacks} rollback(s)"
    )
    yield f"goodput {time.shares['train']:.1%} of the wall time:"
    for kind, seconds in time.seconds.items():
        if seconds:
            told = _TOLD.get(kind, "")
            yield f"  {kind:<10} {seconds:>12,.2f} s  {time.shares[kind]:>6.1%}  {told}"
    yield f"  {'sum':<10} {time.wall_seconds:>12,.2f} s  {sum(time.shares.values()):>6.1%}"
    if time.wasted_steps:
        yield f"{time.wasted_steps} steps were done again after a crash or rollback"
    if time.saves:
        yield (
            f"{len(time.saves)} saves stalled training by "
            f"{sum(time.saves) / len(time.saves):.3f} s each, {max(time.saves):.3f} s at most: "
            f"{_save_share(time):.2%} of the training time"
        )
    if (median := _first_step_seconds(time)) is not None:
        yield f"{len(time.attempts) - 1} restarts, stepping again after {_span(median)} (median)"
    for number, found in _slow(report.metrics).items():
        yield (
            f"process {number} held the others up in {found['times']} comparison(s), by "
            f"{found['mean_seconds']:.3f} s a step"
        )
    for attempt in time.attempts:
        first = attempt.first_step_seconds
        if attempt.number == time.attempts[0].number:
            began = "" if first is None else f", first step after {_span(first)}"
        else:
            again = "no step again" if first is None else f"stepping again after {_span(first)}"
            began = f", {_span(attempt.down)} after the last sign of life, {again}"
        yield (
            f"attempt {attempt.number}: {_when(attempt.start)}, steps {attempt.first_step} to "
            f"{attempt.last_step}, {attempt.ended}{began}"
        )


def as_html(report: Report) -> str:
    """The report as one HTML page that needs nothing else."""
    time = report.account
    marks = [attempt.first_step for attempt in time.attempts[1:]]
    text = "\n".join(as_text(report))
    parts = [
        f"<p>Steps {time.attempts[0].first_step} to {time.attempts[-1].last_step} in "
        f"{_span(time.wall_seconds)}; goodput <b>{time.shares['train']:.1%}</b>; "
        f"{len(time.attempts) - 1} restart(s), marked in red.</p>",
        "<h2>Where the time went</h2>",
        *stacked_bar(time.seconds, whole=time.wall_seconds, unit="s"),
        *_table(time),
        "<h2>Loss, nats per token</h2>",
        *line_chart({s: _curve(report.metrics, s, "loss") for s in ("train", "eval")}, marks=marks),
        "<h2>Tokens per second</h2>",
        *line_chart({"train": _curve(report.metrics, "train", "tokens_per_second")}, marks=marks),
        "<h2>All of it</h2><pre>" + html.escape(text) + "</pre>",
    ]
    return page(f"Report on {report.workdir}", parts)


def _curve(
    metrics: Sequence[Mapping[str, Any]], split: str, name: str
) -> list[tuple[float, float]]:
    lines = [m for m in metrics if m.get("split") == split and _is_number(m.get(name))]
    return [(m["step"], m[name]) for m in lines]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**53)


def _table(time: Account) -> Iterator[str]:
    yield "<table>"
    for color, (kind, seconds) in zip(itertools.cycle(COLORS), time.seconds.items(), strict=False):
        yield (
            f"<tr><td><span style='color:{color}'>&#9632;</span> {html.escape(kind)}</td>"
            f"<td class='n'>{seconds:,.2f} s</td><td class='n'>{time.shares[kind]:.1%}</td>"
            f"<td>{_TOLD.get(kind, '')}</td></tr>"
        )
    yield f"<tr><td>sum</td><td class='n'>{time.wall_seconds:,.2f} s</td><td></td></tr></table>"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return str(datetime.timedelta(seconds=round(seconds)))


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).isoformat(" ", "seconds")
