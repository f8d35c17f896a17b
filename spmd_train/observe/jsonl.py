"""metrics.jsonl: an object a line, one run however often it was interrupted.

Every line is strict JSON. A number is written with the digits that give the same float64 back. What
JSON has no number for is a string that `float()` reads: "NaN", "Infinity", "-Infinity" - so that a
diverged loss cannot be taken for a missing one. A value that does not exist here (MFU on a CPU) is
null.
"""

from __future__ import annotations

import json
import logging
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

_NON_FINITE = ("NaN", "Infinity", "-Infinity")

_log = logging.getLogger(__name__)


class JsonlWriter:
    """Appends metrics to a file, each line whole and flushed."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resume_step: int = 0,
        now: Callable[[], float] = time.time,
    ):
        """Opens the file, and drops from it what the run is about to write again.

        Lines of an earlier attempt with a step after `resume_step` go, and so does a last line that
        a killed process left unfinished. The file is replaced by its shortened self in one atomic
        step. With `resume_step=0` nothing was restored: the file begins anew.

        Args:
            path: the file; its folder is made.
            resume_step: the restored step.
            now: seconds since 1970, for each line's `time`.
        """
        self._path = pathlib.Path(path)
        self._now = now
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._keep_until(resume_step)
        self._file = self._path.open("a", encoding="utf-8")

    def _keep_until(self, resume_step: int) -> None:
        content = self._path.read_bytes()
        lines = content.splitlines()
        # Nothing was restored: not even a line of step 0 is this run's.
        kept = [line for line in lines if resume_step and 0 <= _step_of(line) <= resume_step]
        text = b"".join(line + b"\n" for line in kept)
        if text == content:
            return
        if broken := sum(_step_of(line) < 0 for line in lines):
            _log.warning("%s: dropped %d unreadable line(s)", self._path, broken)
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Appends `{"step", "split", **values, "time"}`."""
        record = {"step": int(step), "split": split}
        record |= {name: strict_json(value) for name, value in values.items()}
        record["time"] = self._now()
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file, NaN and infinities as floats; no unfinished last line."""
    lines = pathlib.Path(path).read_bytes().splitlines()
    records = [json.loads(line) for line in lines if _step_of(line) >= 0]
    return [
        {name: float(v) if v in _NON_FINITE else v for name, v in record.items()}
        for record in records
    ]


def strict_json(value: float | None) -> float | str | None:
    """A number as it stands in a line: what JSON has no number for as a string."""
    if value is None or isinstance(value, int):
        return value
    value = float(value)  # NumPy's and JAX's scalars too
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _step_of(line: bytes) -> int:
    """The step of a line; -1 if it is none of ours."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return -1
