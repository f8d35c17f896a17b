"""What the tests of the pipeline share: a small model, packed and ragged batches, one device."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

from spmd_train.config import (
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PipelineConfig,
    ScheduleConfig,
    ShardingConfig,
    TrainConfig,
)
from spmd_train.parallel.mesh import make_mesh
from spmd_train.tasks import LanguageModel
from spmd_train.train.program import Program, make_program

BATCH, LENGTH, VOCAB = 16, 16, 64


def program(
    mesh: dict[str, int] | None = None,
    *,
    pipeline: dict[str, Any] | None = None,
    accumulation: int = 1,
    batch_size: int = BATCH,
    length: int = LENGTH,
    rules: dict[str, str] | None = None,
    loss: dict[str, Any] | None = None,
    **model: Any,
) -> Program:
    """A program on a mesh; plain gradient descent, so that parameters tell of gradients."""
    sizes = {"data": 1, **(mesh or {})}
    keys: dict[str, Any] = {
        "num_layers": 4,
        "embed_dim": 32,
        "num_heads": 4,
        "mlp_dim": 64,
        "vocab_size": VOCAB,
        "init_scale": 0.2,
        **model,
    }
    return make_program(
        LanguageModel(
            model_config=ModelConfig(**keys),
            loss_config=LossConfig(z_loss=1e-3, **(loss or {})),
            sequence_length=length,
        ),
        mesh=make_mesh(MeshConfig(**sizes), devices=jax.devices()[: math.prod(sizes.values())]),
        sharding=ShardingConfig(rules=rules or {}),
        optimizer=OptimizerConfig(
            name="sgd",
            learning_rate=0.1,
            schedule=ScheduleConfig(name="constant"),
            weight_decay=0.0,
            clip_norm=0.0,
        ),
        train=TrainConfig(global_batch_size=batch_size, grad_accumulation=accumulation),
        pipeline=PipelineConfig(**(pipeline or {})),
    )


def ragged_batch(program: Program, seed: int) -> dict[str, jax.Array]:
    """Packed documents of random lengths, rows of different fill, one of them empty."""
    random = np.random.default_rng(seed)
    shape = BATCH, LENGTH
    segments = 3 - np.sort(random.integers(0, 4, shape), axis=1)
    segments[:, ::-1].sort(axis=1)
    segments = np.where(segments > 0, segments.max(axis=1, keepdims=True) + 1 - segments, 0)
    segments[3] = 0
    positions = np.zeros(shape, np.int32)
    for t in range(1, LENGTH):
        same = segments[:, t] == segments[:, t - 1]
        positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
    batch = {
        "tokens": random.integers(0, VOCAB, shape),
        "targets": random.integers(0, VOCAB, shape),
        "segment_ids": segments,
        "positions": positions,
        "weights": segments > 0,
        "row": np.arange(BATCH),
    }
    abstract = program.abstract_batch
    return {
        name: jax.device_put(x.astype(abstract[name].dtype), abstract[name].sharding)
        for name, x in batch.items()
    }


def train(program: Program, *, steps: int = 3) -> dict[str, Any]:
    """Metrics of some steps, the parameters after them, and an evaluation of those."""
    state = program.init(0)
    metrics = []
    for step in range(steps):
        state, told = program.train_step(state, ragged_batch(program, step))
        metrics.append(jax.device_get(told))
    told = program.eval_step(state.params, ragged_batch(program, 99))
    return {"train": metrics, "params": jax.device_get(state.params), "eval": jax.device_get(told)}


@functools.cache
def _on_one_device(model: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return train(program(**dict(model)))


def assert_as_on_one_device(got: dict[str, Any], **model: Any) -> None:
    """Metrics and parameters are those of one device, up to float32 noise."""
    wanted = _on_one_device(tuple(sorted(model.items())))
    compare = functools.partial(np.testing.assert_allclose, rtol=2e-5)
    jax.tree.map(compare, got["train"], wanted["train"])
    jax.tree.map(compare, got["eval"], wanted["eval"])
    initial = jax.device_get(program(**model).init(0).params)
    for (path, x), y, first in zip(
        jax.tree_util.tree_leaves_with_path(got["params"]),
        jax.tree.leaves(wanted["params"]),
        jax.tree.leaves(initial),
        strict=True,
    ):
        # What has been learnt, not where it began, sets the scale.
        moved = np.abs(y - first).max()
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-5 * moved + 2e-7, err_msg=str(path))
