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

from spmd_train import cluster
from spmd_train.checkpoint import Checkpointer
from spmd_train.checkpoint.steps import committed_steps
from spmd_train.checkpoint.workdir import hold
from spmd_train.config import ConfigError, ExperimentConfig, to_dict, to_json
from spmd_train.data import Dataset, Tokenizer, load_tokenizer, open_dataset
from spmd_train.folders import make_folder
from spmd_train.nn.attention import check_attention
from spmd_train.observe import (
    log_examples,
)
from spmd_train.parallel.batches import HostBatch, put_batch, rows_here
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.rules import use_layout
from spmd_train.parallel.sequence import check_heads
from spmd_train.tasks import Batch, Task, make_task
from spmd_train.train.evaluate import evaluate, with_bits_per_byte
from spmd_train.train.generate import Sampling, generate
from spmd_train.train.program import Program, make_program
from spmd_train.train.state import Params, join

UNFINISHED_IMPORT = "import.unfinished"
"""The file in a workdir whose parameters are to come from elsewhere, and have not all come."""

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
    def train_batches(
        self, data: Dataset, *, start_batch: int, workdir: Path | None = None
    ) -> Iterator[Iterator[Batch]]:
        """Global batches from a number on, without end; logged if the config says so."""
        size = self.config.train.global_batch_size
        rows = rows_here(self.program.abstract_batch)
        with contextlib.closing(
            data.batches(global_batch_size=size, rows=rows, start_step=start_batch)
        ) as batches:
            here: Iterator[HostBatch] = batches
            if workdir is not None and self.config.train.log_examples:
                here = log_examples(
                    batches, workdir=workdir, process=jax.process_index(), first_batch=start_batch
                )
            yield self.feed(here)

    def evaluate(
        self, params: Params, data: Dataset, *, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Means over the whole split; the loss in nats per token. `stop`: as of `evaluate`."""
        size = self.config.train.global_batch_size
        rows = rows_here(self.program.abstract_batch)
        with contextlib.closing(data.epoch(global_batch_size=size, rows=rows)) as batches:
            values = evaluate(self.program, params, self.feed(batches), stop=stop)
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
        context=config.context,
        pipeline=config.pipeline,
    )
    check_heads(config.model.num_heads, config.model.resolved_kv_heads, program.layout)
    with use_layout(program.layout):
        check_attention(config.model, length=config.data.sequence_length)
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


def load_params(
    config: ExperimentConfig, *, workdir: Path, step: int | None = None
) -> tuple[Experiment, Params, int]:
    """Restores the parameters to evaluate with, and nothing else, onto the config's mesh.

    Args:
        config: a config whose model is the checkpoint's; any mesh.
        workdir: of the run.
        step: which checkpoint; None: the newest.

    Returns:
        The experiment, what to evaluate with (`TrainState.eval_params`), the step.

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
        if step is None:
            step = checkpoints.newest_good()
        elif step in steps and (told := checkpoints.faults(step)):
            raise ConfigError(f"--step={step}: this checkpoint is bad: {'; '.join(told[:5])}")
        if step is None:
            raise ConfigError(f"--workdir={workdir}: has no good checkpoint; train writes them")
        if step not in steps:
            raise ConfigError(
                f"--step={step}: {workdir} has checkpoints of steps {steps or 'none'}"
            )
        state = experiment.program.abstract_state
        name = "params" if state.ema is None else "ema"
        wanted = {name: state.params if state.ema is None else state.ema}
        if state.model_state:
            wanted["model_state"] = state.model_state
        restored = checkpoints.restore(step, wanted, partial=True)
        return experiment, join(restored[name], restored.get("model_state", {})), step


def import_params(
    config: ExperimentConfig, *, workdir: Path, open_: Callable[[Any], Callable[[], Params]]
) -> None:
    """Makes a workdir whose checkpoint of step 0 has parameters from elsewhere.

    Killed on the way, it leaves `UNFINISHED_IMPORT`: the run must not begin with other parameters.

    Args:
        config: what will be trained from it.
        workdir: must have no checkpoint yet.
        open_: is given the abstract parameters, whose shardings say where they belong; looks
            whether they can be had, and returns what makes the real ones.

    Raises:
        ConfigError: the workdir has checkpoints.
    """
    experiment = build(config)
    if committed_steps(Path(workdir) / "checkpoints"):
        raise ConfigError(f"--workdir={workdir}: has checkpoints already; give a new folder")
    read = open_(experiment.program.abstract_state.params)
    with cluster.sharing_mistakes():
        make_folder(workdir, flag="workdir")
        held = hold(workdir) if cluster.is_leader() else contextlib.nullcontext()
    with held:
        unfinished = Path(workdir) / UNFINISHED_IMPORT
        unfinished.touch()
        write_text(Path(workdir) / "config.json", to_json(config))
        state = experiment.program.init_from(read())
        with contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints:
            checkpoints.newest_good()  # Puts aside what an import that was killed has left.
            checkpoints.save(0, state, {"config": to_dict(config)})
            checkpoints.wait()
        unfinished.unlink(missing_ok=True)  # All processes do.


def prompt_ids(
    config: ExperimentConfig, prompts: Sequence[str], tokenizer: Tokenizer
) -> list[list[int]]:
    """Prompts as the beginnings of documents.

    Raises:
        ConfigError: the tokens are not the model's, or learned positions do not reach that far.
    """
    _check_vocabulary(config, tokenizer)
    ids = [[tokenizer.marker, *tokens.tolist()] for tokens in tokenizer.encode_batch(list(prompts))]
    longest, new = max(map(len, ids)), config.sample.max_new_tokens
    reach = config.model.max_positions
    if config.model.positions == "learned" and longest + new > reach:
        raise ConfigError(
            f"sample.max_new_tokens: {new} and a prompt of {longest} tokens make {longest + new}, "
            f"but model.max_positions is {reach}; ask for {max(reach - longest, 0)} at most, or "
            "shorten the prompt"
        )
    return ids


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
    ids = prompt_ids(experiment.config, prompts, tokenizer)
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


def write_text(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
