"""The loop: dispatch step n, then read the metrics of n-1, so that the device never waits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax

from spmd_train.observe import StepClock
from spmd_train.tasks import Batch
from spmd_train.train.program import Metrics, Program
from spmd_train.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class LoopEvents:
    """What the loop calls; each gets the number of optimizer steps done.

    Attributes:
        stepped: after every step, with its metrics as read from the device (sums).
        pause_due: whether `paused` is to be called after this step.
        paused: with the state, when `pause_due`: evaluation and checkpoints. All earlier metrics
            have been reported, and its time is not counted as the step's.
    """

    stepped: Callable[[int, Metrics], None]
    pause_due: Callable[[int], bool]
    paused: Callable[[int, TrainState], None]


def run_loop(
    program: Program,
    state: TrainState,
    batches: Iterator[Batch],
    *,
    start_step: int,
    num_steps: int,
    clock: StepClock,
    events: LoopEvents,
) -> TrainState:
    """Trains from `start_step` to `num_steps`.

    Args:
        program: whose `train_step` to run.
        state: donated; the one returned replaces it.
        batches: global batches from `start_step` on.
        start_step: optimizer steps done.
        num_steps: optimizer steps to have done at the end.
        clock: measures steps and waits for data.
        events: what is called on the way.

    Returns:
        The last state.
    """
    pending: tuple[int, Metrics] | None = None

    def report() -> None:
        nonlocal pending
        if pending is not None:
            step, metrics = pending
            pending = None
            with clock.devices():
                values = jax.device_get(metrics)
            events.stepped(step, values)

    for step in range(start_step + 1, num_steps + 1):
        with clock.waiting():
            batch = next(batches)
        with clock.devices():
            state, metrics = program.train_step(state, batch)
        clock.step_done()
        report()
        pending = step, metrics
        if events.pause_due(step):
            report()
            with clock.paused():
                events.paused(step, state)
    report()
    return state
