"""A bad step again: from the checkpoint before it, with the batch of its bundle."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import jax

from spmd_train.checkpoint import Checkpointer
from spmd_train.config import ConfigError, parse
from spmd_train.experiment import build, open_data
from spmd_train.parallel.batches import put_batch
from spmd_train.parallel.rules import use_layout
from spmd_train.parallel.sequence import place
from spmd_train.train.bad_numbers import Rollbacks, not_finite, read_bundle
from spmd_train.train.evaluate import means
from spmd_train.train.state import Params, join
from spmd_train.training import start_from


def replay(bundle: Path) -> dict[str, Any]:
    """Makes a bad step again, from the checkpoint before it.

    Args:
        bundle: `WORKDIR/bad_steps/STEP`, as an aborted run has left it.

    Returns:
        `step` and `why` of the bundle; `loss` and `grad_norm` as they are again (strings, for NaN
        has no JSON); `batch`, `params` and `grads`: names of the arrays that are not finite before
        and in that step, with the first layer where layers are stacked.

    Raises:
        ConfigError: it is no bundle, or its run has no good checkpoint before the step.
    """
    told, rows = read_bundle(bundle)
    config = parse(told["config"])
    experiment = build(config)
    program = experiment.program
    workdir = bundle.absolute().parent.parent
    rollbacks = Rollbacks(workdir)
    with contextlib.closing(
        Checkpointer(workdir, config.checkpoint, read_only=True)
    ) as checkpoints:
        state, start, number = start_from(experiment, checkpoints, rollbacks, before=told["step"])
    size = config.train.global_batch_size
    data = open_data(config, split="train")
    for _ in range(start + 1, told["step"]):
        batch = put_batch(data.batch(number, global_batch_size=size), program.abstract_batch)
        state, _ = program.train_step(state, batch)
        number += 1
    if number != told["batch"]:
        raise ConfigError(f"{bundle}: is of batch {told['batch']}, but the run is at {number}")
    batch = put_batch(rows, program.abstract_batch)

    def loss(params: Params) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        axes = experiment.task.batch_axes()
        with use_layout(program.layout):
            placed = {name: place(x, axes[name]) for name, x in batch.items()}
            model = program.model.merge(join(params, state.model_state))
            return experiment.task.loss(model, placed, key=key).loss_sum

    found = {
        "step": told["step"],
        "why": told["why"],
        "batch": not_finite(rows),
        "params": not_finite(state.params),
        "grads": not_finite(jax.jit(jax.grad(loss))(state.params)),
    }
    _, metrics = program.train_step(state, batch)
    values = means(jax.device_get(metrics))
    return found | {"loss": str(values["loss"]), "grad_norm": str(values["grad_norm"])}
