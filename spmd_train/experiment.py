"""The composition root, which sees every room: config -> mesh -> task -> program -> loop."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spmd_train.checkpoint import Checkpointer
from spmd_train.config import ConfigError, ExperimentConfig, to_dict, to_json
from spmd_train.data import Dataset, Tokenizer, load_tokenizer, open_dataset
from spmd_train.observe import (
    Progress,
    StepClock,
    Writers,
    device_memory_bytes,
    device_peak_flops,
    make_writers,
    mfu,
    model_flops_per_token,
)
from spmd_train.parallel.batches import HostBatch, put_batch, rows_here
from spmd_train.parallel.mesh import make_mesh
from spmd_train.tasks import Batch, Task, make_task
from spmd_train.train.evaluate import evaluate, means, with_bits_per_byte
from spmd_train.train.generate import Sampling, generate
from spmd_train.train.loop import LoopEvents, run_loop
from spmd_train.train.program import Metrics, Program, make_program
from spmd_train.train.state import Params, TrainState

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """A config brought to life on a mesh; nothing is allocated or compiled yet.

    Attributes:
        config: the whole of it.
        task: what is learnt.
        program: the jitted functions, with the plan and the mesh.
    """

    config: ExperimentConfig
    task: Task
    program: Program

    def feed(self, batches: Iterator[HostBatch]) -> Iterator[Batch]:
        """Global arrays from the rows that this host has read."""
        abstract = self.program.abstract_batch
        return (put_batch(batch, abstract) for batch in batches)

    @contextlib.contextmanager
    def train_batches(self, data: Dataset, *, start_step: int) -> Iterator[Iterator[Batch]]:
        """Global batches from a step on, without end."""
        size = self.config.train.global_batch_size
        rows = rows_here(self.program.abstract_batch)
        with contextlib.closing(
            data.batches(global_batch_size=size, rows=rows, start_step=start_step)
        ) as batches:
            yield self.feed(batches)

    def evaluate(self, params: Params, data: Dataset) -> dict[str, float]:
        """Means over the whole split; the loss in nats per token."""
        size = self.config.train.global_batch_size
        rows = rows_here(self.program.abstract_batch)
        with contextlib.closing(data.epoch(global_batch_size=size, rows=rows)) as batches:
            values = evaluate(self.program, params, self.feed(batches))
        return with_bits_per_byte(values, bytes_per_token=data.bytes_per_token)


def build(config: ExperimentConfig, *, devices: Sequence[Any] | None = None) -> Experiment:
    """Builds mesh, task and program.

    Args:
        config: a parsed config.
        devices: to lay the mesh over; default: all there are.

    Returns:
        The experiment.

    Raises:
        ConfigError: the mesh, the plan or the batch is impossible.
    """
    task = make_task(config)
    program = make_program(
        task,
        mesh=make_mesh(config.mesh, devices=devices),
        sharding=config.sharding,
        optimizer=config.optimizer,
        train=config.train,
        pipeline=config.pipeline,
    )
    return Experiment(config=config, task=task, program=program)


def open_data(config: ExperimentConfig, *, split: str) -> Dataset:
    """Opens a split; tokenizes it the first time.

    Raises:
        ConfigError: there is no such data, or the model's vocabulary is too small for it.
    """
    _check_vocabulary(config, load_tokenizer(config.data.tokenizer))
    return open_dataset(config.data, split=split, seed=config.train.seed)


def _check_vocabulary(config: ExperimentConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is too small for the tokenizer "
            f"{config.data.tokenizer!r}, which has {tokenizer.vocab_size} tokens"
        )


def train(config: ExperimentConfig, *, workdir: Path) -> None:
    """Trains to `train.num_steps`, from the workdir's newest checkpoint if it has one.

    Args:
        config: what to train.
        workdir: made if it is missing: config.json, checkpoints/, metrics.jsonl, tensorboard/.

    Raises:
        ConfigError: the config is impossible, or does not fit the workdir's checkpoint.
    """
    experiment = build(config)
    data = open_data(config, split="train")
    eval_data = open_data(config, split="eval") if config.train.eval_every else None
    with contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints:
        state, start = _start(experiment, checkpoints)
        if start >= config.train.num_steps:
            log.info("%s: finished, %d steps of %d", workdir, start, config.train.num_steps)
            return
        leader = jax.process_index() == 0
        _announce(experiment, data, start)
        run_config = to_dict(config)
        with (
            make_writers(config.observe, workdir=workdir, resume_step=start, run_config=run_config)
            if leader
            else Writers(()) as writers,
            Progress(config.train.num_steps, start, quiet=not leader) as progress,
            experiment.train_batches(data, start_step=start) as batches,
        ):
            if leader:
                _write_text(workdir / "config.json", to_json(config))
            clock = StepClock(
                tokens_per_step=config.train.global_batch_size * config.data.sequence_length,
                start_step=start,
            )
            run = _Run(experiment, data, eval_data, checkpoints, writers, progress, clock)
            state = run_loop(
                experiment.program,
                state,
                batches,
                start_step=start,
                num_steps=config.train.num_steps,
                clock=clock,
                events=LoopEvents(run.stepped, run.pause_due, run.paused),
            )
        if config.sample.prompt and leader and jax.process_count() == 1:
            text = sample_text(
                experiment, state.eval_params, [config.sample.prompt], data.tokenizer
            )[0]
            log.info("a sample:\n%s%s", config.sample.prompt, text)
        checkpoints.wait()
        log.info(
            "written to %s: config.json, metrics.jsonl, %scheckpoints/%s",
            workdir,
            "tensorboard/, " if config.observe.tensorboard else "",
            "{" + ",".join(map(str, checkpoints.steps())) + "}",
        )


def _start(experiment: Experiment, checkpoints: Checkpointer) -> tuple[TrainState, int]:
    """The state to go on from and its step: the newest checkpoint's, or a fresh one."""
    program = experiment.program
    steps = checkpoints.steps()
    if not steps:
        return program.init(experiment.config.train.seed), 0
    state = checkpoints.restore(steps[-1], program.abstract_state)
    log.info("goes on from step %d in %s", steps[-1], checkpoints.directory)
    return state, steps[-1]


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
    ) -> None:
        self._experiment = experiment
        self._data = data
        self._eval_data = eval_data
        self._checkpoints = checkpoints
        self._writers = writers
        self._progress = progress
        self._clock = clock
        config, mesh = experiment.config, experiment.program.mesh
        length = config.data.sequence_length
        self._flops_per_token = model_flops_per_token(config.model, sequence_length=length)
        self._peak_flops = device_peak_flops(
            config.observe,
            device_kind=mesh.devices.flat[0].device_kind,
            dtype=config.model.compute_dtype,
        )

    def stepped(self, step: int, metrics: Metrics) -> None:
        """Logs a step if it is due."""
        self._progress.update(step)
        train = self._experiment.config.train
        if step % train.log_every and step not in (1, train.num_steps):
            return
        values: dict[str, float | None] = {
            **with_bits_per_byte(means(metrics), bytes_per_token=self._data.bytes_per_token),
            **self._clock.read(step),
            **device_memory_bytes(jax.local_devices()),
        }
        values["mfu"] = mfu(
            values["tokens_per_second"],
            flops_per_token=self._flops_per_token,
            num_devices=self._experiment.program.mesh.size,
            peak_flops=self._peak_flops,
        )
        self._log(step, "train", values)

    def pause_due(self, step: int) -> bool:
        """Whether an evaluation or a checkpoint is due."""
        return self._due(step, "eval_every") or self._due(step, "checkpoint_every")

    def paused(self, step: int, state: TrainState) -> None:
        """Saves, then evaluates while the files are being written."""
        if self._due(step, "checkpoint_every"):
            config = self._experiment.config
            meta = {
                "config": to_dict(config),
                "data": {"step": step, "global_batch_size": config.train.global_batch_size},
                "mesh": {a: n for a, n in self._experiment.program.mesh.shape.items() if n > 1},
            }
            self._checkpoints.save(step, state, meta)
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


def load_params(
    config: ExperimentConfig, *, workdir: Path, step: int | None = None
) -> tuple[Experiment, Params, int]:
    """Restores the parameters to evaluate with, and nothing else, onto the config's mesh.

    Args:
        config: a config whose model is the checkpoint's; any mesh.
        workdir: of the run.
        step: which checkpoint; None: the newest.

    Returns:
        The experiment, the parameters (their moving average where there is one), the step.

    Raises:
        ConfigError: there is no such checkpoint, or the model is another.
    """
    experiment = build(config)
    if not (Path(workdir) / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir}: has no checkpoints; train writes them")
    with contextlib.closing(
        Checkpointer(workdir, config.checkpoint, read_only=True)
    ) as checkpoints:
        steps = checkpoints.steps()
        if not steps or (step is not None and step not in steps):
            raise ConfigError(
                f"--step={step if step is not None else 'newest'}: {workdir} has checkpoints of "
                f"steps {steps or 'none'}"
            )
        step = steps[-1] if step is None else step
        state = experiment.program.abstract_state
        name = "params" if state.ema is None else "ema"
        wanted = {name: state.eval_params}
        return experiment, checkpoints.restore(step, wanted, partial=True)[name], step


def import_params(
    config: ExperimentConfig, *, workdir: Path, load: Callable[[Any], Params]
) -> None:
    """Makes a workdir whose checkpoint of step 0 has parameters from elsewhere.

    Args:
        config: what will be trained from it.
        workdir: must have no checkpoint yet.
        load: makes the parameters from the abstract ones, whose shardings say where they belong.

    Raises:
        ConfigError: the workdir has checkpoints.
    """
    experiment = build(config)
    if (Path(workdir) / "checkpoints").is_dir():
        raise ConfigError(f"--workdir={workdir}: has checkpoints already; give a new folder")
    params = load(experiment.program.abstract_state.params)
    state = experiment.program.init_from(params)
    with contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints:
        checkpoints.save(0, state, {"config": to_dict(config)})
    _write_text(Path(workdir) / "config.json", to_json(config))


def sample_text(
    experiment: Experiment,
    params: Params,
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
) -> list[str]:
    """Continues texts as `config.sample` says.

    Args:
        experiment: whose program to use.
        params: sharded as the program plans.
        prompts: texts; each becomes the beginning of a document.
        tokenizer: between text and tokens.
        seed: of the draws.

    Returns:
        The continuations, without the prompts.
    """
    config = experiment.config.sample
    _check_vocabulary(experiment.config, tokenizer)
    ids = [[tokenizer.marker, *tokens.tolist()] for tokens in tokenizer.encode_batch(list(prompts))]
    sampling = Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    new = generate(
        experiment.program,
        params,
        ids,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        seed=seed,
        stop_token=tokenizer.marker,
    )
    return [tokenizer.decode(tokens) for tokens in new]


def _write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
