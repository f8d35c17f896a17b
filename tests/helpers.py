"""What the proofs about training share: tiny configs, random batches, steps, comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from spmd_train.config import (
    ContextConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    PipelineConfig,
    ScheduleConfig,
    ShardingConfig,
    TrainConfig,
)
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.rules import leaf_path
from spmd_train.tasks import LanguageModel
from spmd_train.train.program import Program, make_program
from spmd_train.train.state import TrainState

ROOT = pathlib.Path(__file__).parent.parent

# Every sharded dim divides by 8: so the same model lies on any mesh of 8 devices.
MODEL = ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_heads=8,
    head_dim=4,
    mlp_dim=64,
    vocab_size=64,
    init_scale=0.2,
)
# Large enough an epsilon that Adam does not blow float32 noise in tiny gradients up to a step.
OPTIMIZER = OptimizerConfig(
    learning_rate=1e-2, schedule=ScheduleConfig(name="constant"), epsilon=1e-4
)
TRAIN = TrainConfig(num_steps=10, global_batch_size=32, seed=3)
LENGTH = 32
SEQUENCE_SHARDED = ShardingConfig(rules={"residual_sequence": "tensor"})

# Float32 noise after five steps that each move a parameter by up to 1e-2: measured 4.4e-6, most of
# it where the norm of a query or key amplifies it. Losses are near 5, where a float32 has 5e-7.
LOSS_TOLERANCE = 5e-6
PARAMS_TOLERANCE = 2e-5

RESHARDED_WHOLE = "Involuntary full rematerialization"

# Experts: every token served; an expert full after its share; so little sent at a time that every
# step needs several exchanges; balanced by biases.
DROPLESS = MoEConfig(num_experts=8, expert_mlp_dim=16, load_balancing_loss=0.05, router_z_loss=0.01)
CAPACITY = dataclasses.replace(DROPLESS, dispatch="capacity", capacity_factor=1.0)
ROUNDS = dataclasses.replace(DROPLESS, exchange_factor=0.4)
BIAS = MoEConfig(
    num_experts=8,
    top_k=3,
    expert_mlp_dim=16,
    num_shared_experts=1,
    scores="sigmoid",
    balance="bias",
    bias_update_speed=0.01,
)

Arrays = Mapping[str, np.ndarray]


def program_of(
    mesh: Mapping[str, int],
    *,
    model: ModelConfig = MODEL,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    optimizer: OptimizerConfig = OPTIMIZER,
    sharding: ShardingConfig = ShardingConfig(),  # noqa: B008
    train: TrainConfig = TRAIN,
    context: ContextConfig = ContextConfig(),  # noqa: B008
    pipeline: PipelineConfig = PipelineConfig(),  # noqa: B008
    length: int = LENGTH,
    **train_changes: Any,
) -> Program:
    """A program on the first devices that the mesh needs; `{}` is one device."""
    config = MeshConfig(**{"data": 1, **mesh})
    num_devices = int(np.prod([getattr(config, axis) for axis in mesh] or [1]))
    return make_program(
        LanguageModel(model_config=model, moe_config=moe, loss_config=loss, sequence_length=length),
        mesh=make_mesh(config, devices=jax.devices()[:num_devices]),
        sharding=sharding,
        optimizer=optimizer,
        train=dataclasses.replace(train, **train_changes),
        context=context,
        pipeline=pipeline,
    )


def random_batch(
    kind: str = "packed",
    *,
    seed: int = 0,
    size: int = TRAIN.global_batch_size,
    length: int = LENGTH,
    vocab_size: int = MODEL.vocab_size,
) -> dict[str, np.ndarray]:
    """A batch of random tokens.

    Args:
        kind: `plain`: one document per row; `packed`: several, each with its own positions;
            `ragged`: packed, padded to very different lengths, some rows wholly.
        seed: of the tokens.
        size: B.
        length: T.
        vocab_size: tokens are below it.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab_size, (size, length + 1)).astype(np.int32)
    begins = np.zeros((size, length), bool)
    if kind != "plain":
        begins = rng.random((size, length)) < 3 / length
    begins[:, 0] = True
    steps = np.arange(length)
    segment_ids = np.cumsum(begins, axis=1)
    positions = steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1)
    weights = np.ones((size, length))
    if kind == "ragged":
        weights = (steps < rng.integers(0, length + 1, (size, 1))).astype(np.float32)
        weights[rng.permutation(size)[: size // 4]] = 0
        weights[0] = 1
        segment_ids, positions = segment_ids * (weights > 0), positions * (weights > 0)
        ids[:, :-1] *= weights > 0
    return {
        "tokens": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "weights": weights.astype(np.float32),
        "row": np.arange(size, dtype=np.int32),
    }


def param_shapes(model: ModelConfig = MODEL) -> dict[str, jax.ShapeDtypeStruct]:
    """Path to the shape of every parameter."""
    params = program_of({}, model=model).model.abstract_params
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {leaf_path(path): leaf for path, leaf in flat}


def put(program: Program, batch: Arrays) -> dict[str, jax.Array]:
    """The batch, sharded as the program wants it."""
    return jax.device_put(
        dict(batch), {name: s.sharding for name, s in program.abstract_batch.items()}
    )


def put_state(program: Program, state: Any) -> Any:
    """Copies a state from anywhere into the program's shardings."""
    shardings = jax.tree.map(lambda s: s.sharding, program.abstract_state)
    return jax.device_put(jax.tree.map(np.array, jax.device_get(state)), shardings)


@contextlib.contextmanager
def no_compilation_cache() -> Iterator[None]:
    """XLA compiles what is compiled within: it logs, and every analysis of the program is there."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def stderr_of_xla() -> Iterator[list[str]]:
    """Collects what is written to file descriptor 2 within, as one string in the list."""
    found: list[str] = []
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            found.append(file.read().decode())


def compile_step(program: Program) -> tuple[jax.stages.Compiled, str]:
    """The train step, and what XLA logged."""
    lowered = program.lower_train_step()
    with no_compilation_cache(), stderr_of_xla() as log:
        compiled = lowered.compile()
    return compiled, log[0]


def run_steps(
    program: Program,
    batches: Sequence[Arrays],
    *,
    state: TrainState | None = None,
    step: Any = None,
) -> tuple[np.ndarray, TrainState]:
    """Losses per token of a step on each batch, and the state after them.

    Args:
        program: the program.
        batches: on the host.
        state: donated; None: a fresh one.
        step: the compiled step; None: `program.train_step`.
    """
    state = program.init(TRAIN.seed) if state is None else state
    losses = []
    for batch in batches:
        state, metrics = (step or program.train_step)(state, put(program, batch))
        losses.append(float(metrics["loss_sum"]) / float(metrics["weight_sum"]))
    return np.array(losses), state


@functools.cache
def reference(
    model: ModelConfig,
    loss: LossConfig,
    kind: str,
    moe: MoEConfig = MoEConfig(),  # noqa: B008 - frozen
    seed: int = TRAIN.seed,
) -> tuple[list[Arrays], Any, np.ndarray, dict[str, np.ndarray]]:
    """Five batches, the first state on the host, losses and the last parameters on one device."""
    batches = [random_batch(kind, seed=seed) for seed in range(5)]
    program = program_of({}, model=model, loss=loss, moe=moe)
    start = program.init(seed)
    first = jax.device_get(start)
    step, _ = compile_step(program)
    losses, state = run_steps(program, batches, state=put_state(program, first), step=step)
    return batches, first, losses, by_path((state.params, state.model_state))


def check_learning(
    program: Program, step: Any, expected: Any, *, loss_tolerance: float = LOSS_TOLERANCE
) -> None:
    """Losses of five steps and all parameters after them are those of a `reference`."""
    batches, first, wanted_losses, wanted = expected
    state = put_state(program, first)
    losses, state = run_steps(program, batches, state=state, step=step)
    np.testing.assert_allclose(losses, wanted_losses, rtol=0, atol=loss_tolerance)
    difference = largest_difference((state.params, state.model_state), wanted)
    assert difference[0] < PARAMS_TOLERANCE, difference
    start = by_path((first.params, first.model_state))
    for path, array in wanted.items():
        assert np.abs(array - start[path]).max() > 100 * PARAMS_TOLERANCE, path


def by_path(tree: Any) -> dict[str, np.ndarray]:
    """Path to leaf, on the host."""
    flat = jax.tree_util.tree_flatten_with_path(jax.device_get(tree))[0]
    return {leaf_path(path): np.asarray(leaf) for path, leaf in flat}


def largest_difference(tree: Any, other: Any) -> tuple[float, str]:
    """The largest absolute difference between two trees of arrays, and where it is."""
    a, b = by_path(tree), by_path(other)
    assert a.keys() == b.keys()
    worst = {p: float(np.max(np.abs(a[p].astype(np.float64) - b[p]), initial=0)) for p in a}
    return max((v, p) for p, v in worst.items())


def plan_of(*words: str, code: int = 0) -> dict[str, Any]:
    """What `spmd-train plan --json` says with these flags, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "spmd_train", "plan", "--json", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)
