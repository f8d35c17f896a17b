"""Training: from a workdir's newest good checkpoint to the last step, whatever happens between."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from pathlib import Path

import jax
import numpy as np

from spmd_train import cluster
from spmd_train.checkpoint import Checkpointer
from spmd_train.config import ExperimentConfig, describe, to_dict, to_json
from spmd_train.data import Dataset
from spmd_train.experiment import Experiment, build, open_data, sample_text, write_text
from spmd_train.observe import (
    Heartbeat,
    Progress,
    StepClock,
    Writers,
    device_memory_bytes,
    device_peak_flops,
    make_writers,
    mfu,
    model_flops_per_token,
)
from spmd_train.train.bad_numbers import (
    BadStepError,
    NumbersWatch,
    Rollbacks,
    write_bundle,
)
from spmd_train.train.evaluate import means, with_bits_per_byte
from spmd_train.train.loop import LoopEvents, run_loop
from spmd_train.train.preemption import PreemptedError, StopNotice
from spmd_train.train.program import Metrics
from spmd_train.train.state import TrainState

log = logging.getLogger(__name__)


def train(config: ExperimentConfig, *, workdir: Path) -> None:
    """Trains to `train.num_steps`, from the workdir's newest good checkpoint if it has one.

    Args:
        config: what to train.
        workdir: made if it is missing: config.json, checkpoints/, metrics.jsonl, tensorboard/.

    Raises:
        ConfigError: the config is impossible, or does not fit the workdir's checkpoint.
        PreemptedError: told to stop by SIGTERM or Ctrl-C, and saved.
        BadStepError: a step's numbers are bad, and `train.bad_step` does not get over it.
        OSError: checkpoints cannot be written.
    """
    _check_same_config(config)
    experiment = build(config)
    if jax.process_count() > 1:
        lowered = experiment.program.lower_train_step()
        digest = hashlib.blake2b(lowered.as_text().encode(), digest_size=16).hexdigest()
        cluster.check_same({"the lowered train step": digest})
        lowered.compile()  # Into the compilation cache, so that all begin the first step together.
    data = open_data(config, split="train")
    eval_data = open_data(config, split="eval") if config.train.eval_every else None
    leader = jax.process_index() == 0
    rollbacks = Rollbacks(workdir)
    with contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints:
        while True:
            state, start, batch = start_from(experiment, checkpoints, rollbacks)
            if start >= config.train.num_steps:
                log.info("%s: finished, %d steps of %d", workdir, start, config.train.num_steps)
                return
            try:
                state = _steps(
                    experiment,
                    state,
                    data,
                    eval_data,
                    checkpoints,
                    workdir=workdir,
                    start_step=start,
                    start_batch=batch,
                )
                break
            except BadStepError as bad:
                del state  # Its buffers, donated or not, must go before the next are made.
                bad_batch = batch + bad.step - start - 1
                can_roll_back = rollbacks.count(start) < config.train.max_bad_steps
                if config.train.bad_step != "rollback" or not can_roll_back:
                    if leader:
                        bundle = write_bundle(
                            workdir,
                            bad,
                            config=to_dict(config),
                            batch_number=bad_batch,
                            batch=data.batch(
                                bad_batch, global_batch_size=config.train.global_batch_size
                            ),
                        )
                        log.error("%s; spmd-train replay %s does it again", bad, bundle)
                    raise
                checkpoints.settle()
                good = checkpoints.newest_good() or 0
                skip = bad_batch + 1 - _next_batch(checkpoints, good, rollbacks)
                log.warning("%s: back to step %d, without the %d batches since", bad, good, skip)
                if leader:
                    rollbacks.add(step=good, skip=skip, bad_step=bad.step, why=bad.why)
                cluster.meet(f"rollback {rollbacks.count()} of step {bad.step}")
        if config.sample.prompt and leader and jax.process_count() == 1:
            text = sample_text(
                experiment, state.eval_params, [config.sample.prompt], data.tokenizer
            )[0]
            log.info("a sample:\n%s%s", config.sample.prompt, text)
        if leader:
            log.info(
                "written to %s: config.json, metrics.jsonl, %scheckpoints/%s",
                workdir,
                "tensorboard/, " if config.observe.tensorboard else "",
                "{" + ",".join(map(str, checkpoints.steps())) + "}",
            )


def _steps(
    experiment: Experiment,
    state: TrainState,
    data: Dataset,
    eval_data: Dataset | None,
    checkpoints: Checkpointer,
    *,
    workdir: Path,
    start_step: int,
    start_batch: int,
) -> TrainState:
    """Trains from a step on, with the batches from a number on, and saves."""
    config = experiment.config
    leader = jax.process_index() == 0
    if leader:
        _announce(experiment, data, start_step)
    run_config = to_dict(config)
    with (
        make_writers(config.observe, workdir=workdir, resume_step=start_step, run_config=run_config)
        if leader
        else Writers(()) as writers,
        Progress(config.train.num_steps, start_step, quiet=not leader) as progress,
        experiment.train_batches(data, start_batch=start_batch, workdir=workdir) as batches,
        StopNotice() as notice,
    ):
        heartbeat = Heartbeat()
        if leader:
            write_text(workdir / "config.json", to_json(config))
        clock = StepClock(
            tokens_per_step=config.train.global_batch_size * config.data.sequence_length,
            start_step=start_step,
        )
        run = _Run(
            experiment,
            data,
            eval_data,
            checkpoints,
            writers,
            progress,
            clock,
            notice,
            heartbeat,
            batches_ahead=start_batch - start_step,
        )
        heartbeat.beat(start_step, checkpoints.committed)
        cluster.meet(f"step {start_step}, batch {start_batch}")
        state = run_loop(
            experiment.program,
            state,
            batches,
            start_step=start_step,
            num_steps=config.train.num_steps,
            clock=clock,
            events=LoopEvents(run.stepped, run.pause_due, run.paused),
        )
        checkpoints.wait()
        return state


def _check_same_config(config: ExperimentConfig) -> None:
    """Raises where another process has another config or other code."""
    local = {"data.cache_dir"}
    values = {row.path: str(row.value) for row in describe(config) if row.path not in local}
    cluster.check_same(cluster.code_facts() | {f"config.{k}": v for k, v in values.items()})


def start_from(
    experiment: Experiment,
    checkpoints: Checkpointer,
    rollbacks: Rollbacks,
    *,
    before: int | None = None,
) -> tuple[TrainState, int, int]:
    """The state to go on from, its step and its next batch: of the newest checkpoint, or fresh."""
    program = experiment.program
    step = checkpoints.newest_good(before=before)
    if step is None:
        return program.init(experiment.config.train.seed), 0, rollbacks.skipped(0)
    state = checkpoints.restore(step, program.abstract_state)
    log.info("goes on from step %d in %s", step, checkpoints.directory)
    return state, step, _next_batch(checkpoints, step, rollbacks)


def _next_batch(checkpoints: Checkpointer, step: int, rollbacks: Rollbacks) -> int:
    """The batch that follows a checkpoint's: later than its step where batches were skipped."""
    meta = checkpoints.meta(step) if step in checkpoints.steps() else {}
    return meta.get("data", {}).get("next_batch", step) + rollbacks.skipped(step)


def _announce(experiment: Experiment, data: Dataset, start: int) -> None:
    config, program = experiment.config, experiment.program
    params = jax.tree.leaves(program.abstract_state.params)
    num_params = sum(int(np.prod(p.shape)) for p in params)
    axes = [f"{a}={n}" for a, n in program.mesh.shape.items() if n > 1] or ["one device"]
    tokens = config.train.global_batch_size * config.data.sequence_length
    log.info(
        "%s parameters on %s (%s); %s training tokens, %s per step; step %d to %d",
        f"{num_params:,}",
        " x ".join(axes),
        program.mesh.devices.flat[0].device_kind,
        f"{data.num_tokens:,}",
        f"{tokens:,}",
        start,
        config.train.num_steps,
    )


class _Run:
    """What happens around the steps of one training run."""

    def __init__(
        self,
        experiment: Experiment,
        data: Dataset,
        eval_data: Dataset | None,
        checkpoints: Checkpointer,
        writers: Writers,
        progress: Progress,
        clock: StepClock,
        notice: StopNotice,
        heartbeat: Heartbeat,
        *,
        batches_ahead: int,
    ) -> None:
        self._batches_ahead = batches_ahead
        self._numbers = NumbersWatch(experiment.config.train)
        self._save_seconds = 0.0
        self._heartbeat = heartbeat
        self._experiment = experiment
        self._notice = notice
        self._stopping = False
        self._data = data
        self._eval_data = eval_data
        self._checkpoints = checkpoints
        self._writers = writers
        self._progress = progress
        self._clock = clock
        config, mesh = experiment.config, experiment.program.mesh
        length = config.data.sequence_length
        self._flops_per_token = model_flops_per_token(
            config.model, config.moe, sequence_length=length
        )
        self._peak_flops = device_peak_flops(
            config.observe,
            device_kind=mesh.devices.flat[0].device_kind,
            dtype=config.model.compute_dtype,
        )

    def stepped(self, step: int, metrics: Metrics) -> None:
        """Logs a step if it is due."""
        self._progress.update(step)
        self._heartbeat.beat(step, self._checkpoints.committed)
        weight = float(metrics["weight_sum"])
        self._numbers.check(
            step,
            loss=float(metrics["loss_sum"]) / weight if weight else 0.0,
            grad_norm=float(metrics["grad_norm"]),
        )
        train = self._experiment.config.train
        if step % train.log_every and step not in (1, train.num_steps):
            return
        values: dict[str, float | None] = {
            **with_bits_per_byte(means(metrics), bytes_per_token=self._data.bytes_per_token),
            **self._clock.read(step),
            **device_memory_bytes(jax.local_devices()),
        }
        if self._save_seconds:
            values["save_seconds"], self._save_seconds = self._save_seconds, 0.0
        values["mfu"] = mfu(
            values["tokens_per_second"],
            flops_per_token=self._flops_per_token,
            num_devices=self._experiment.program.mesh.size,
            peak_flops=self._peak_flops,
        )
        self._log(step, "train", values)

    def pause_due(self, step: int) -> bool:
        """Whether an evaluation or a checkpoint is due, or the run is told to stop."""
        agreed = self._notice.agreed(step)
        self._stopping = agreed and step < self._experiment.config.train.num_steps
        due = self._due(step, "eval_every") or self._due(step, "checkpoint_every")
        return self._stopping or due

    def paused(self, step: int, state: TrainState) -> None:
        """Saves, then evaluates while the files are being written."""
        if self._stopping or self._due(step, "checkpoint_every"):
            config = self._experiment.config
            meta = {
                "config": to_dict(config),
                "data": {
                    "next_batch": step + self._batches_ahead,
                    "global_batch_size": config.train.global_batch_size,
                },
                "mesh": {a: n for a, n in self._experiment.program.mesh.shape.items() if n > 1},
            }
            begin = time.monotonic()
            self._checkpoints.save(step, state, meta)
            self._save_seconds += time.monotonic() - begin
        if self._stopping:
            self._checkpoints.wait()
            raise PreemptedError(step, interrupted=self._notice.interrupted)
        if self._eval_data is not None and self._due(step, "eval_every"):
            values = self._experiment.evaluate(state.eval_params, self._eval_data)
            self._log(step, "eval", dict(values))

    def _due(self, step: int, every: str) -> bool:
        train = self._experiment.config.train
        interval: int = {
            "eval_every": train.eval_every,
            "checkpoint_every": train.checkpoint_every,
        }[every]
        return bool(interval) and (step % interval == 0 or step == train.num_steps)

    def _log(self, step: int, split: str, values: dict[str, float | None]) -> None:
        self._writers.write(step, split, values)
        self._progress.log(step, split, values)
