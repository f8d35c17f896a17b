"""Progress for people: a bar on a terminal, lines in a log. Standard error, both."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import TextIO

from rich import progress as rich_progress
from rich.console import Console


def _rate(value: float) -> str:
    for unit in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.4g}{unit}"
        value /= 1000
    return f"{value:.4g}G"


def _gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f}GiB"


_COLUMNS: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "loss": ("loss", 7, "{:.4f}".format),
    "bits_per_byte": ("bpb", 6, "{:.4f}".format),
    "grad_norm": ("grad", 7, "{:.4g}".format),
    "learning_rate": ("lr", 8, "{:.2e}".format),
    "tokens_per_second": ("tok/s", 6, _rate),
    "step_seconds": ("step", 7, "{:.3f}s".format),
    "mfu": ("mfu", 5, "{:.1%}".format),
    "data_wait_seconds": ("wait", 7, "{:.3f}s".format),
    "device_memory_bytes": ("mem", 8, _gibibytes),
    "host_memory_bytes": ("rss", 8, _gibibytes),
    "compile_seconds": ("compile", 6, "{:.1f}s".format),
}
"""Metric to label, width and format, in the order of a line."""


def format_line(step: int, total: int, split: str, values: Mapping[str, float | None]) -> str:
    """One log line: columns in a fixed order and width, then metrics that have no column."""
    parts = [f"{split:<5} {step:>{len(str(total))}}/{total}"]
    for name, (label, width, show) in _COLUMNS.items():
        if (value := values.get(name)) is not None:
            parts.append(f"{label} {show(value):>{width}}")
    others = {k: v for k, v in values.items() if k not in _COLUMNS and v is not None}
    return "  ".join([*parts, *(f"{name} {value:.4g}" for name, value in others.items())])


class Progress:
    """Shows how far the run is; a context manager."""

    def __init__(
        self, total: int, start: int = 0, *, quiet: bool = False, stream: TextIO | None = None
    ):
        """Shows nothing yet.

        Args:
            total: steps of the whole run.
            start: steps made before (a resumed run).
            quiet: show nothing: for all but one process of the run.
            stream: instead of standard error. A terminal gets the bar, anything else lines.
        """
        self._total = total
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar: rich_progress.Progress | None = None
        # Not rich's own guess: FORCE_COLOR would make it draw a bar into a log file.
        if not quiet and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            self._bar = rich_progress.Progress(
                rich_progress.MofNCompleteColumn(),
                rich_progress.BarColumn(bar_width=None),
                rich_progress.TextColumn("{task.fields[latest]}"),
                rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("eta"),
                rich_progress.TimeRemainingColumn(),
                console=Console(file=self._stream),
                # The default of 30 seconds forgets steps that are slower than that.
                speed_estimate_period=600,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, latest="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int) -> None:
        """Moves the bar.

        Args:
            step: steps made so far.
        """
        if self._bar:
            self._bar.update(self._task, completed=step)

    def log(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Shows a step's metrics: train metrics in the bar, others above it; lines in a log.

        Args:
            step: the step they are of.
            split: "train" or "eval".
            values: name to value; None is not shown.
        """
        if self._quiet:
            return
        line = format_line(step, self._total, split, values)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        elif split == "train":
            latest = (
                f"{_COLUMNS[name][0]} {_COLUMNS[name][2](value)}"
                for name in ("loss", "tokens_per_second")
                if (value := values.get(name)) is not None
            )
            self._bar.update(self._task, latest="  ".join(latest))
        else:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
