"""Where the loop's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class StepClock:
    """Times the steps between two readings.

        clock = StepClock(tokens_per_step=batch_size * sequence_length)
        for step in range(start, num_steps):
            with clock.waiting():
                batch = next(batches)
            state, metrics = train_step(state, batch)
            clock.step_done()
            if due:
                values = {**to_host(metrics_of_the_step_before), **clock.read()}
            with clock.paused():
                evaluate(...)

    The first step is apart: it traces and compiles before it is dispatched, and its time is
    `compile_seconds`. Steps are dispatched, not finished, when `step_done` is called; the rates are
    right because both ends of an interval lie after metrics of the step before have been read.
    """

    def __init__(self, *, tokens_per_step: int, now: Callable[[], float] = time.monotonic):
        """Starts the first step's time.

        Args:
            tokens_per_step: of the global batch.
            now: a clock that only goes forward, seconds.
        """
        self._tokens_per_step = tokens_per_step
        self._now = now
        self._compile_seconds: float | None = None
        self._compiled = False
        self._restart()

    def _restart(self) -> None:
        self._begin = self._now()
        self._steps = 0
        self._waited = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch: counted, and part of the step's time."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step (evaluation, saving): not part of any step's time.

        Enter it after a metric was read, lest the step under way be finished on the pause's time.
        """
        begin = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - begin

    def step_done(self) -> None:
        """After each call of the train step."""
        if self._compiled:
            self._steps += 1
            return
        self._compiled = True
        self._compile_seconds = self._now() - self._begin - self._waited - self._paused
        self._restart()

    def read(self) -> dict[str, float | None]:
        """The steps since the last reading, and begins the next interval.

        Returns:
            `step_seconds`, `tokens_per_second`, `data_wait_seconds` (per step): None if only the
            first step was made; `compile_seconds` once, the first step's time until its dispatch.
        """
        seconds = self._now() - self._begin - self._paused
        steps = self._steps
        values: dict[str, float | None] = {
            "step_seconds": seconds / steps if steps else None,
            "tokens_per_second": (
                self._tokens_per_step * steps / seconds if steps and seconds > 0 else None
            ),
            "data_wait_seconds": self._waited / steps if steps else None,
        }
        if self._compile_seconds is not None:
            values["compile_seconds"] = self._compile_seconds
            self._compile_seconds = None
        if steps:
            self._restart()
        return values
