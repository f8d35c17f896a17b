"""Steps that must not count: a loss or gradient that is no number, or far from the usual."""

from __future__ import annotations

import collections
import math
import statistics

from spmd_train.config import TrainConfig

_WINDOW = 100
_FEWEST = 20


class BadStepError(Exception):
    """A step whose numbers are bad; the state after it must not be saved.

    Attributes:
        step: optimizer steps done, this one included.
        why: what is bad.
    """

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step}: {why}")
        self.step = step
        self.why = why


class NumbersWatch:
    """Looks at each step's loss and gradient norm."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._in_a_row = 0

    def check(self, step: int, *, loss: float, grad_norm: float) -> None:
        """Notes a step.

        Args:
            step: optimizer steps done.
            loss: nats per token.
            grad_norm: before clipping.

        Raises:
            BadStepError: its numbers are bad, and the step was not skipped on the device or
                `train.max_bad_steps` in a row were.
        """
        why = self._fault(loss, grad_norm)
        if why is None:
            self._norms.append(grad_norm)
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._config.bad_step != "skip":
            raise BadStepError(step, why)
        if self._in_a_row >= self._config.max_bad_steps:
            raise BadStepError(step, f"{why}, {self._in_a_row} steps in a row")

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the loss is {loss:g}, the gradient's norm {grad_norm:g}"
        factor = self._config.spike_factor
        if factor and len(self._norms) >= _FEWEST:
            usual = statistics.median(self._norms)
            if grad_norm > factor * usual:
                return (
                    f"the gradient's norm {grad_norm:g} is over train.spike_factor={factor:g} "
                    f"times its median of late, {usual:g}"
                )
        return None
