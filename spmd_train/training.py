"""Training: from a workdir's newest good checkpoint to the last step, whatever happens between."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spmd_train import cluster
from spmd_train.checkpoint import Checkpointer
from spmd_train.checkpoint.drift import check_drift
from spmd_train.checkpoint.workdir import hold
from spmd_train.config import ConfigError, ExperimentConfig, describe, to_dict, to_json
from spmd_train.data import Dataset
from spmd_train.experiment import (
    UNFINISHED_IMPORT,
    Experiment,
    build,
    open_data,
    prompt_ids,
    sample_text,
    write_text,
)
from spmd_train.folders import make_folder
from spmd_train.observe import (
    Goodput,
    Heartbeat,
    Progress,
    StepClock,
    Stragglers,
    Writers,
    check_writers,
    host_bytes,
    make_writers,
)
from spmd_train.parallel.mesh import mesh_text
from spmd_train.parallel.replicas import ReplicaCheck
from spmd_train.running import Run, Watchers, evaluation_is_owed
from spmd_train.train.bad_numbers import BadStepError, Rollbacks, write_bundle
from spmd_train.train.loop import run_loop
from spmd_train.train.preemption import StopNotice
from spmd_train.train.state import TrainState
from spmd_train.xla_flags import flags_in_force, program_options

log = logging.getLogger(__name__)


def train(config: ExperimentConfig, *, workdir: Path, age: float = 0.0) -> None:
    """Trains to `train.num_steps`, from the workdir's newest good checkpoint if it has one.

    Args:
        config: what to train.
        workdir: made if it is missing: config.json, checkpoints/, metrics.jsonl, goodput.jsonl,
            tensorboard/.
        age: seconds since this process began, for the account of its time.

    Raises:
        ConfigError: the config is impossible, or does not fit the workdir's checkpoint.
        PreemptedError: told to stop by SIGTERM or Ctrl-C, and saved.
        BadStepError: a step's numbers are bad, and `train.bad_step` does not get over it.
        CorruptStateError: copies of the state on different devices have become different.
        OSError: checkpoints cannot be written.
    """
    leader = cluster.is_leader()
    goodput = Goodput(workdir if leader else None, age=age)
    _check_same_config(config)
    with cluster.sharing_mistakes():
        experiment = build(config)
    backend = jax.default_backend()
    flags = flags_in_force(backend, os.environ)
    flags |= program_options(backend, compute_dtype=config.model.compute_dtype)
    if leader and flags:
        log.info("XLA flags: %s", " ".join(f"--{name}={value}" for name, value in flags.items()))
    if jax.process_count() > 1:
        with goodput.span("compile"):
            lowered = experiment.program.lower_train_step()
            digest = hashlib.blake2b(lowered.as_text().encode(), digest_size=16).hexdigest()
            cluster.check_same({"the lowered train step": digest})
            # Into the compilation cache, so that all begin the first step together.
            lowered.compile()
    with cluster.sharing_mistakes():
        _check_batch_fits(experiment)
        data = open_data(config, split="train")
        eval_data = open_data(config, split="eval") if config.train.eval_every else None
        if config.sample.prompt:
            prompt_ids(config, [config.sample.prompt], data.tokenizer)  # Before it is trained for.
        if leader:
            check_writers(config.observe)
    with cluster.sharing_mistakes():  # Nothing is written before all have found the above right.
        make_folder(workdir, flag="workdir")
        held = hold(workdir) if leader else contextlib.nullcontext()
    rollbacks = Rollbacks(workdir)
    notice = StopNotice()  # Kept over rollbacks.
    with (
        held,
        goodput,
        contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints,
    ):
        while True:
            with goodput.span("restore"):
                facts = cluster.code_facts() | data.facts
                state, start, batch = start_from(experiment, checkpoints, rollbacks, facts=facts)
            evaluate_first = evaluation_is_owed(config.train, start, workdir=workdir)
            if start >= config.train.num_steps and not evaluate_first:
                log.info("%s: finished, %d steps of %d", workdir, start, config.train.num_steps)
                return
            goodput.begin(start)
            try:
                state = _steps(
                    experiment,
                    state,
                    data,
                    eval_data,
                    checkpoints,
                    goodput,
                    notice,
                    workdir=workdir,
                    start_step=start,
                    start_batch=batch,
                    evaluate_first=evaluate_first,
                )
                break
            except BadStepError as bad:
                del state  # Its buffers, donated or not, must go before the next are made.
                bad_batch = batch + bad.step - start - 1
                can_roll_back = rollbacks.count(start) < config.train.max_bad_steps
                if config.train.bad_step != "rollback" or not can_roll_back:
                    if leader:
                        _leave_bundle(experiment, data, bad, workdir=workdir, number=bad_batch)
                    raise
                checkpoints.settle()
                good = checkpoints.newest_good() or 0
                meta = checkpoints.meta(good) if good in checkpoints.steps() else {}
                skip = bad_batch + 1 - _next_batch(meta, good, rollbacks)
                log.warning("%s: back to step %d, without the %d batches since", bad, good, skip)
                # Nobody reads the file while the line is written.
                cluster.meet_again()
                if leader:
                    rollbacks.add(step=good, skip=skip, bad_step=bad.step, why=bad.why)
                cluster.meet_again()
        if config.sample.prompt and leader and jax.process_count() == 1:
            with goodput.span("eval"):
                text = sample_text(
                    experiment, state.eval_params, [config.sample.prompt], data.tokenizer
                )[0]
            log.info("a sample:\n%s%s", config.sample.prompt, text)
        if leader:
            log.info(
                "written to %s: config.json, metrics.jsonl, goodput.jsonl, %scheckpoints/%s",
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
    goodput: Goodput,
    notice: StopNotice,
    *,
    workdir: Path,
    start_step: int,
    start_batch: int,
    evaluate_first: bool,
) -> TrainState:
    """Trains from a step on, with the batches from a number on, and saves and evaluates."""
    config = experiment.config
    leader = cluster.is_leader()
    if leader:
        _announce(experiment, data, start_step)
    goodput.become("init")
    run_config = to_dict(config)
    with (
        make_writers(config.observe, workdir=workdir, resume_step=start_step, run_config=run_config)
        if leader
        else Writers(()) as writers,
        Progress(config.train.num_steps, start_step, quiet=not leader) as progress,
        experiment.train_batches(data, start_batch=start_batch, workdir=workdir) as batches,
        notice,
    ):
        if leader:
            write_text(workdir / "config.json", to_json(config))
        clock = StepClock(
            tokens_per_step=config.train.global_batch_size * config.data.sequence_length,
            start_step=start_step,
        )
        hosts = cluster.tell_all(cluster.host())
        watchers = Watchers(
            writers=writers,
            progress=progress,
            clock=clock,
            goodput=goodput,
            heartbeat=Heartbeat(),
            notice=notice,
            stragglers=Stragglers(clock, every=config.observe.straggler_every),
            replicas=ReplicaCheck(experiment.program.abstract_state, hosts=hosts),
        )
        run = Run(
            experiment,
            data,
            eval_data,
            checkpoints,
            watchers,
            batches_ahead=start_batch - start_step,
        )
        watchers.heartbeat.beat(start_step, checkpoints.committed)
        cluster.meet(f"step {start_step}, batch {start_batch}")
        if evaluate_first:
            with clock.paused():
                run.catch_up(start_step, state)
        goodput.become("compile")
        state = run_loop(
            experiment.program,
            state,
            goodput.waited(batches),
            start_step=start_step,
            num_steps=config.train.num_steps,
            clock=clock,
            events=run.events,
        )
        with goodput.span("save"):
            checkpoints.wait()
        return state


def _check_batch_fits(experiment: Experiment) -> None:
    """Refuses a batch that is larger than the host's memory."""
    batch = experiment.program.abstract_batch.values()
    rows = experiment.config.train.global_batch_size
    needed = sum(x.size * x.dtype.itemsize for x in batch) // jax.process_count()
    there = host_bytes()
    if needed > there:
        key, number = "train.global_batch_size", rows
        if needed > rows * there:  # Not even one row.
            key, number = "data.sequence_length", experiment.config.data.sequence_length
        raise ConfigError(
            f"{key} = {number}: this process's part of a batch takes {needed:,} bytes, and the "
            f"host has {there:,}; set at most {number * there // needed}"
        )


def _leave_bundle(
    experiment: Experiment, data: Dataset, bad: BadStepError, *, workdir: Path, number: int
) -> None:
    config = experiment.config
    bundle = write_bundle(
        workdir,
        bad,
        config=to_dict(config),
        batch_number=number,
        batch=data.batch(number, global_batch_size=config.train.global_batch_size),
    )
    log.error("%s; spmd-train replay %s does it again", bad, bundle)


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
    facts: Mapping[str, str] | None = None,
) -> tuple[TrainState, int, int]:
    """The state to go on from, its step and its next batch: of the newest checkpoint, or fresh.

    Args:
        experiment: what is trained.
        checkpoints: of its workdir.
        rollbacks: likewise.
        before: only checkpoints before this step.
        facts: versions and data, to be compared with the checkpoint's as `checkpoint.on_drift`
            says; None: nothing is compared.

    Raises:
        ConfigError: the checkpoint does not fit, or differs and `checkpoint.on_drift` is `refuse`;
            or there were some, and all of them are damaged; or one was to be imported.
    """
    program, config = experiment.program, experiment.config
    step = checkpoints.newest_good(before=before)
    if step is None:
        if damaged := checkpoints.damaged(before=before):
            raise ConfigError(
                f"{checkpoints.directory}: all checkpoints are damaged ({', '.join(damaged)}), and "
                "there is none to go on from. To begin anew give a new workdir, or delete them "
                "with spmd-train checkpoints prune"
            )
        if (checkpoints.directory.parent / UNFINISHED_IMPORT).exists():
            raise ConfigError(
                f"{checkpoints.directory.parent}: an import into it was not finished, and training "
                "would begin with random parameters. Run spmd-train convert import again, or give "
                "another --workdir"
            )
        return program.init(config.train.seed), 0, rollbacks.skipped(0)
    meta = checkpoints.meta(step)
    if facts is not None:
        check_drift(
            meta,
            config=to_dict(config),
            facts=facts,
            policy=config.checkpoint,
            tell=cluster.is_leader(),
        )
    state = checkpoints.restore(step, program.abstract_state)
    log.info("goes on from step %d in %s", step, checkpoints.directory)
    return state, step, _next_batch(meta, step, rollbacks)


def _next_batch(meta: Mapping[str, Any], step: int, rollbacks: Rollbacks) -> int:
    """The batch that follows a checkpoint's: later than its step where batches were skipped."""
    return meta.get("data", {}).get("next_batch", step) + rollbacks.skipped(step)


def _announce(experiment: Experiment, data: Dataset, start: int) -> None:
    config, program = experiment.config, experiment.program
    params = jax.tree.leaves(program.abstract_state.params)
    num_params = sum(int(np.prod(p.shape)) for p in params)
    tokens = config.train.global_batch_size * config.data.sequence_length
    log.info(
        "%s parameters on %s (%s); %s training tokens, %s per step; step %d to %d",
        f"{num_params:,}",
        mesh_text(program.mesh.shape),
        program.mesh.devices.flat[0].device_kind,
        f"{data.num_tokens:,}",
        f"{tokens:,}",
        start,
        config.train.num_steps,
    )
