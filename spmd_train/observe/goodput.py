"""goodput.jsonl: where the wall time of a run goes, over all of its attempts.

Process 0's time is cut into spans that neither overlap nor leave gaps. A line tells how long each
kind has taken since the line before: what is missing at the end is an attempt's last seconds only,
and the sums are exact. `observe.account` reads it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

NAME = "goodput.jsonl"
_SHORTEST, _LONGEST = 1.0, 10.0

log = logging.getLogger(__name__)
T = TypeVar("T")


class Goodput:
    """One attempt's line-by-line account; a context manager that notes how the attempt ended.

    with Goodput(workdir, age=seconds_since_start) as goodput:
        ...                           # counts as `init`
        with goodput.span("restore"):
            ...
        goodput.begin(step)           # from here on it is written down
        goodput.become("train")
        for batch in goodput.waited(batches):
            goodput.stepped(step)
    """

    def __init__(
        self,
        workdir: Path | None,
        *,
        age: float = 0.0,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Writes nothing yet.

        Args:
            workdir: of the run; None: nothing is ever written (other processes than 0).
            age: seconds since this process began, which count as `init`.
            now: seconds since 1970.
            monotonic: a clock that only goes forward, seconds.
        """
        self._path = None if workdir is None else Path(workdir) / NAME
        self._handle: int | None = None
        self._monotonic = monotonic
        self._since = self._born = monotonic() - age
        self._born_at = now() - age
        self._kind = "init"
        self._spans: dict[str, float] = {}
        self._step = self._first = 0
        self._attempt = 0
        self._written = 0.0

    def _settle(self) -> None:
        now = self._monotonic()
        self._spans[self._kind] = self._spans.get(self._kind, 0.0) + now - self._since
        self._since = now

    def become(self, kind: str) -> None:
        """From now on time counts as `kind`, where no span says otherwise."""
        if kind != self._kind:
            self._settle()
            self._kind = kind

    @contextlib.contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Time within counts as `kind`."""
        before = self._kind
        self.become(kind)
        try:
            yield
        finally:
            self.become(before)

    def waited(self, items: Iterator[T]) -> Iterator[T]:
        """Passes items on; the wait for each counts as `data_wait`."""
        while True:
            with self.span("data_wait"):
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item

    def begin(self, step: int) -> None:
        """The attempt goes on from a step: fresh, restored, or rolled back to."""
        self.write()  # What came before a rollback belongs to the steps that it takes back.
        self._step = self._first = step
        if self._path is not None and self._handle is None:
            try:
                self._open(self._path)
            except OSError as error:
                log.warning("%s cannot be written: %s", self._path, error)
        self.write(begin=step)

    def stepped(self, step: int) -> None:
        """Notes a finished step; a line is written for the first, then every 1 to 10 seconds."""
        first = self._step == self._first
        self._step = step
        # One per cent of the attempt's age: soon at first, and a megabyte a day.
        pause = (self._monotonic() - self._born) / 100
        if first or self._monotonic() - self._written > min(max(pause, _SHORTEST), _LONGEST):
            self.write()

    def write(self, **told: Any) -> None:
        """Writes the spans since the last line; a full disk is warned of, and they are kept."""
        if self._handle is None:
            return
        self._settle()
        line = {
            "attempt": self._attempt,
            "time": round(self._born_at + self._since - self._born, 6),
            "step": self._step,
            "spans": {kind: round(s, 6) for kind, s in self._spans.items() if s},
            **told,
        }
        size = os.fstat(self._handle).st_size
        content = json.dumps(line).encode() + b"\n"
        try:
            if os.write(self._handle, content) < len(content):
                raise OSError("the disk took a part of the line only")
        except OSError as error:
            os.ftruncate(self._handle, size)
            log.warning("%s could not be written: %s", self._path, error)
            return
        self._spans.clear()
        self._written = self._since

    def _open(self, path: Path) -> None:
        self._attempt = max((line["attempt"] for line in read_goodput(path)), default=0) + 1
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        # A process that was killed while it wrote has left half a line.
        os.ftruncate(self._handle, path.read_bytes().rfind(b"\n") + 1)

    def __enter__(self) -> Goodput:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        if self._handle is not None:
            self.write(end="done" if kind is None else kind.__name__)
            os.close(self._handle)
            self._handle = None


def read_goodput(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a goodput.jsonl, oldest first; none if there is no such file."""
    lines = []
    content = path.read_bytes() if path.is_file() else b""
    for text in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_ours(line):
            lines.append(line)
    return lines


def _is_ours(line: Any) -> bool:
    """Whether a line is as `Goodput.write` makes them, whoever made it."""
    if not isinstance(line, dict) or not isinstance(line.get("spans"), dict):
        return False
    whole = [line.get("attempt"), line.get("step"), *(line[k] for k in ("begin",) if k in line)]
    seconds = [line.get("time"), *line["spans"].values()]
    latest = 1e11  # The year 5138: what a date can still be made of.
    return (
        all(type(n) is int and 0 <= n < 2**53 for n in whole)
        and all(type(s) in (int, float) and 0 <= s < latest for s in seconds)
        and isinstance(line.get("end", ""), str)
    )
