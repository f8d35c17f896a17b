"""What happens around the steps of a run: logging, evaluation, checkpoints, stopping, checks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from spmd_train import cluster
from spmd_train.checkpoint import Checkpointer
from spmd_train.config import TrainConfig, to_dict
from spmd_train.data import Dataset
from spmd_train.experiment import Experiment
from spmd_train.observe import (
    Goodput,
    Heartbeat,
    Progress,
    StepClock,
    Stragglers,
    Writers,
    device_memory_bytes,
    device_peak_flops,
    mfu,
    model_flops_per_token,
    read_jsonl,
)
from spmd_train.parallel.replicas import ReplicaCheck
from spmd_train.train.bad_numbers import NumbersWatch
from spmd_train.train.evaluate import StoppedError, means, with_bits_per_byte
from spmd_train.train.loop import LoopEvents
from spmd_train.train.preemption import PreemptedError, StopNotice
from spmd_train.train.program import Metrics
from spmd_train.train.state import TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watchers:
    """Who is told of a run's steps.

    Attributes:
        writers: of metrics.
        progress: for people.
        clock: of the loop.
        goodput: where the wall time goes.
        heartbeat: for the supervisor.
        notice: whether to stop.
        stragglers: which process is slow.
        replicas: whether copies of the state still agree.
    """

    writers: Writers
    progress: Progress
    clock: StepClock
    goodput: Goodput
    heartbeat: Heartbeat
    notice: StopNotice
    stragglers: Stragglers
    replicas: ReplicaCheck


_DUE: dict[str, Callable[[TrainConfig], int]] = {
    "eval_every": lambda train: train.eval_every,
    "checkpoint_every": lambda train: train.checkpoint_every,
    "check_replicas_every": lambda train: train.check_replicas_every,
}


def is_due(train: TrainConfig, step: int, every: str) -> bool:
    """Whether `eval_every`, `checkpoint_every` or `check_replicas_every` asks for this step."""
    interval = _DUE[every](train)
    last = every != "check_replicas_every" and step == train.num_steps
    return bool(interval) and (step % interval == 0 or last)


def evaluation_is_owed(train: TrainConfig, step: int, *, workdir: Path) -> bool:
    """Whether the run that saved this step ended before it had evaluated it.

    All processes must ask: only the leader reads what was logged.
    """
    if not step or not is_due(train, step, "eval_every"):
        return False
    path = workdir / "metrics.jsonl"
    lines = read_jsonl(path) if cluster.is_leader() and path.is_file() else []
    evaluated = any((line["step"], line["split"]) == (step, "eval") for line in lines)
    return cluster.tell_all(str(evaluated))[0] == str(False)


class Run:
    """What the loop calls around its steps."""

    def __init__(
        self,
        experiment: Experiment,
        data: Dataset,
        eval_data: Dataset | None,
        checkpoints: Checkpointer,
        watchers: Watchers,
        *,
        batches_ahead: int,
    ) -> None:
        """Does nothing yet.

        Args:
            experiment: what is trained.
            data: of the train split.
            eval_data: of the eval split, if it is evaluated.
            checkpoints: where to save.
            watchers: who is told.
            batches_ahead: batches that rollbacks have left out before this step.
        """
        self._experiment = experiment
        self._data = data
        self._eval_data = eval_data
        self._checkpoints = checkpoints
        self._watchers = watchers
        self._batches_ahead = batches_ahead
        self._numbers = NumbersWatch(experiment.config.train)
        # For the next line of metrics, whichever step that is of.
        self._told: dict[str, float] = {}
        self._stopping = False
        config, mesh = experiment.config, experiment.program.mesh
        self._flops_per_token = model_flops_per_token(
            config.model, config.moe, sequence_length=config.data.sequence_length
        )
        self._peak_flops = device_peak_flops(
            config.observe,
            device_kind=mesh.devices.flat[0].device_kind,
            dtype=config.model.compute_dtype,
        )

    @property
    def events(self) -> LoopEvents:
        """For `run_loop`."""
        return LoopEvents(self._stepped, self._pause_due, self._paused)

    def _stepped(self, step: int, metrics: Metrics) -> None:
        """Logs a step if it is due."""
        watchers = self._watchers
        watchers.progress.update(step)
        watchers.heartbeat.beat(step, self._checkpoints.committed)
        watchers.goodput.stepped(step)
        train = self._experiment.config.train
        if train.check_replicas_every:
            watchers.replicas.prepare()  # While the device computes.
        weight = float(metrics["weight_sum"])
        self._numbers.check(
            step,
            loss=float(metrics["loss_sum"]) / weight if weight else 0.0,
            grad_norm=float(metrics["grad_norm"]),
        )
        self._told |= watchers.stragglers.stepped(step)
        if step % train.log_every and step not in (1, train.num_steps):
            return
        values: dict[str, float | None] = {
            **with_bits_per_byte(means(metrics), bytes_per_token=self._data.bytes_per_token),
            **watchers.clock.read(step),
            **device_memory_bytes(jax.local_devices()),
            **self._told,
        }
        self._told = {}
        values["mfu"] = mfu(
            values["tokens_per_second"],
            flops_per_token=self._flops_per_token,
            num_devices=self._experiment.program.mesh.size,
            peak_flops=self._peak_flops,
        )
        self._log(step, "train", values)

    def _pause_due(self, step: int) -> bool:
        """Whether anything is due that needs the state, or the run is told to stop."""
        self._watchers.goodput.become("train")  # From here on the first step is compiled.
        agreed = self._watchers.notice.agreed()
        self._stopping = agreed and step < self._experiment.config.train.num_steps
        return self._stopping or any(self._due(step, every) for every in _DUE)

    def _paused(self, step: int, state: TrainState) -> None:
        """Saves, then evaluates while the files are being written."""
        saving = self._stopping or self._due(step, "checkpoint_every")
        if saving:
            self._save(step, state)
        elif self._due(step, "check_replicas_every"):
            self._check_replicas(step, state)
        if not self._stopping and self._due(step, "eval_every"):
            self._evaluate(step, state)
            if self._stopping and not saving:
                self._save(step, state)
        self._leave_if_told(step)

    def catch_up(self, step: int, state: TrainState) -> None:
        """Evaluates a saved step that its run did not come to evaluate."""
        self._evaluate(step, state)
        self._leave_if_told(step)

    def _evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates and logs, unless told to stop meanwhile: then it is owed (see above)."""
        assert self._eval_data is not None
        with self._watchers.goodput.span("eval"):
            try:
                values = self._experiment.evaluate(
                    state.eval_params, self._eval_data, stop=self._watchers.notice.agreed
                )
            except StoppedError:
                self._stopping = True
                return
        self._log(step, "eval", dict(values))

    def _leave_if_told(self, step: int) -> None:
        if self._stopping:
            with self._watchers.goodput.span("save"):
                self._checkpoints.wait()
            raise PreemptedError(step, interrupted=self._watchers.notice.interrupted)

    def _check_replicas(self, step: int, state: TrainState) -> None:
        if self._experiment.config.train.check_replicas_every:
            with self._watchers.goodput.span("check"):
                self._watchers.replicas.check(step, state)

    def _save(self, step: int, state: TrainState) -> None:
        self._check_replicas(step, state)
        begin, goodput = time.monotonic(), self._watchers.goodput
        with goodput.span("save"):
            self._checkpoints.save(step, state, self._meta(step))
            goodput.write(saved=step)
        waited = time.monotonic() - begin
        self._told["save_seconds"] = self._told.get("save_seconds", 0.0) + waited

    def _meta(self, step: int) -> dict[str, Any]:
        """What is kept beside the state."""
        config = self._experiment.config
        return {
            "config": to_dict(config),
            "data": {
                "next_batch": step + self._batches_ahead,
                "global_batch_size": config.train.global_batch_size,
                "facts": self._data.facts,
            },
            "mesh": {a: n for a, n in self._experiment.program.mesh.shape.items() if n > 1},
        }

    def _due(self, step: int, every: str) -> bool:
        return is_due(self._experiment.config.train, step, every)

    def _log(self, step: int, split: str, values: dict[str, float | None]) -> None:
        self._watchers.writers.write(step, split, values)
        self._watchers.progress.log(step, split, values)
