"""Where the loop's time goes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator


class StepClock:
    """Times the steps between two readings.

        clock = StepClock(tokens_per_step=batch_size * sequence_length, start_step=start)
        for step in range(start + 1, num_steps + 1):
            with clock.waiting():
                batch = next(batches)
            with clock.devices():
                state, metrics = train_step(state, batch)
            clock.step_done()
            if due:
                with clock.devices():
                    values = to_host(metrics_before)
                values |= clock.read(step - 1)
            with clock.paused():
                evaluate(...)

    The first step is apart: it traces and compiles before it is dispatched, and that time is
    `compile_seconds`. Later steps may be running while the host is ahead of them; so an interval
    begins and ends where a step is known to be finished, because its metrics were read.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        start_step: int = 0,
        now: Callable[[], float] = time.monotonic,
    ):
        """Starts the first step's time.

        Args:
            tokens_per_step: of the global batch.
            start_step: steps that were made before (a resumed run).
            now: a clock that only goes forward, seconds.
        """
        self._tokens_per_step = tokens_per_step
        self._now = now
        self._first_step = start_step + 1
        self._dispatched = start_step
        self._compile_seconds: float | None = None
        self._born = now()
        self._all_waited = self._all_paused = self._all_devices = 0.0
        self._restart(finished=start_step)

    def _restart(self, *, finished: int) -> None:
        self._begin = self._now()
        self._finished = finished
        self._waited = 0.0
        self._paused = 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch: counted, and part of the step's time."""
        begin = self._now()
        try:
            yield
        finally:
            seconds = self._now() - begin
            self._waited += seconds
            self._all_waited += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no step (evaluation, saving): not part of any step's time.

        Enter it after the last step's metrics were read, lest that step run on the pause's time.
        """
        begin = self._now()
        try:
            yield
        finally:
            seconds = self._now() - begin
            self._paused += seconds
            self._all_paused += seconds

    @contextlib.contextmanager
    def devices(self) -> Iterator[None]:
        """Around what waits for the devices: metrics, and dispatch while their queue is full."""
        begin = self._now()
        try:
            yield
        finally:
            self._all_devices += self._now() - begin

    def totals(self) -> tuple[float, float, float]:
        """Seconds since the beginning: of steps, waiting for data, waiting for devices."""
        return self._now() - self._born - self._all_paused, self._all_waited, self._all_devices

    def step_done(self) -> None:
        """After each call of the train step: it is dispatched, perhaps not finished."""
        self._dispatched += 1
        if self._dispatched == self._first_step:
            self._compile_seconds = self._now() - self._begin - self._waited - self._paused
            self._restart(finished=self._dispatched - 1)

    def read(self, step: int | None = None) -> dict[str, float | None]:
        """The steps since the last reading; begins the next interval.

        Args:
            step: the step whose metrics were just read; None: the last one dispatched.

        Returns:
            `step_seconds`, `tokens_per_second`, `data_wait_seconds` (per step), None if no step or
            only the first was finished since; and once `compile_seconds`, the first step's time
            until its dispatch.
        """
        finished = self._dispatched if step is None else step
        steps = finished - self._finished
        seconds = self._now() - self._begin - self._paused
        known = steps > 0 and finished > self._first_step and seconds > 0
        values: dict[str, float | None] = {
            "step_seconds": seconds / steps if known else None,
            "tokens_per_second": self._tokens_per_step * steps / seconds if known else None,
            "data_wait_seconds": self._waited / steps if known else None,
        }
        if self._compile_seconds is not None:
            values["compile_seconds"] = self._compile_seconds
            self._compile_seconds = None
        if steps > 0:
            self._restart(finished=finished)
        return values
