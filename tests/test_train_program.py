"""The compiled program: how often, how large, what it keeps and what it never makes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MODEL,
    TRAIN,
    by_path,
    compile_step,
    largest_difference,
    program_of,
    put,
    put_state,
    random_batch,
    run_steps,
)

from spmd_train import training
from spmd_train.config import (
    DataConfig,
    ExperimentConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    ObserveConfig,
    OptimizerConfig,
    TrainConfig,
)
from spmd_train.inspect.hlo import parse_hlo
from spmd_train.inspect.memory import memory_report
from spmd_train.observe import Writers
from spmd_train.tasks import LossOutput
from spmd_train.train import program as program_module
from spmd_train.train.accumulate import sum_gradients

ALL2 = {"data": 2, "fsdp": 2, "tensor": 2}
compiled: list[str] = []
"""Names of the functions that XLA compiled in this process, in order."""


def _listen(event: str, seconds: float, **told: str | int) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(str(told["fun_name"]))


jax.monitoring.register_event_duration_secs_listener(_listen)


def state_bytes(program) -> int:
    """Of one device's part of the train state."""
    return sum(
        int(np.prod(s.sharding.shard_shape(s.shape))) * s.dtype.itemsize
        for s in jax.tree.leaves(program.abstract_state)
    )


def test_train_compiles_each_function_once(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run, with evaluations and checkpoints; after the first of each nothing compiles."""
    words = np.random.default_rng(0).integers(97, 123, (20, 1500)).astype(np.uint8)
    for i, text in enumerate(words):
        (tmp_path / f"{i}.txt").write_bytes(bytes(text))
    config = ExperimentConfig(
        model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16),
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        data=DataConfig(
            source="text",
            path=str(tmp_path / "*.txt"),
            eval_fraction=0.1,
            sequence_length=32,
            cache_dir=str(tmp_path / "cache"),
        ),
        train=TrainConfig(
            num_steps=6,
            global_batch_size=8,
            grad_accumulation=2,
            log_every=1,
            eval_every=2,
            checkpoint_every=2,
        ),
        observe=ObserveConfig(tensorboard=False),
    )
    seen: dict[tuple[str, int], int] = {}
    write = Writers.write

    def noting(self: Writers, step: int, split: str, values: dict[str, float | None]) -> None:
        seen[split, step] = len(compiled)
        write(self, step, split, values)

    monkeypatch.setattr(Writers, "write", noting)
    start = len(compiled)
    training.train(config, workdir=tmp_path / "run")
    functions = Counter(compiled[start:])
    assert functions["jit(train_step)"] == 1, functions
    assert functions["jit(eval_step)"] == 1, functions
    assert functions["jit(init)"] == 1, functions
    assert set(seen) == {("train", s) for s in range(1, 7)} | {("eval", s) for s in (2, 4, 6)}
    assert compiled[seen["train", 3] :] == []


def test_train_step_donates_the_state() -> None:
    program = program_of(ALL2)
    step, _ = compile_step(program)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), program.abstract_state)
    state = put_state(program, zeros)
    after, _ = step(state, put(program, random_batch()))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert memory_report(step)["alias_bytes"] == state_bytes(program)


def test_train_program_does_not_grow_with_depth() -> None:
    sizes = []
    for num_layers in (3, 12):
        step, _ = compile_step(
            program_of({}, model=dataclasses.replace(MODEL, num_layers=num_layers))
        )
        computations = parse_hlo(step.as_text()).computations.values()
        sizes.append(sum(len(c.instructions) for c in computations))
    # XLA fuses a little differently; a layer more would be hundreds of instructions.
    assert abs(sizes[1] - sizes[0]) < 0.02 * sizes[0], sizes


def test_train_chunked_loss_never_holds_all_logits() -> None:
    """Vocabulary 128k: the compiler's own account of its memory, and no such array in the HLO."""
    model = dataclasses.replace(MODEL, embed_dim=8, num_heads=2, vocab_size=131072, mlp_dim=8)
    temp, whole = {}, f"f32[4,64,{model.vocab_size}]"
    for chunk in (0, 8):
        program = program_of(
            {}, model=model, loss=LossConfig(chunk_tokens=chunk), length=64, global_batch_size=4
        )
        step, _ = compile_step(program)
        temp[chunk] = memory_report(step)["temp_bytes"]
        assert (whole in step.as_text()) == (chunk == 0)
    logits = 4 * 64 * model.vocab_size * 4
    assert temp[0] > logits > 2 * temp[8], temp


@pytest.mark.parametrize("tied", [False, True])
def test_train_chunked_loss_is_the_loss(tied: bool) -> None:
    model = dataclasses.replace(MODEL, tied_head=tied, logit_softcap=3.0)
    program = {
        chunk: program_of({}, model=model, loss=LossConfig(z_loss=0.1, chunk_tokens=chunk))
        for chunk in (0, 4)
    }
    params = program[0].init(0).params
    batch = random_batch("ragged")
    value = {}
    for chunk, p in program.items():

        def loss(params, p=p):
            sums = p.model.task.loss(p.model.merge(params), batch, key=None)
            return sums.loss_sum, sums

        value[chunk] = jax.jit(jax.grad(loss, has_aux=True))(params)
    difference = largest_difference(value[0][0], value[4][0])
    largest = max(np.abs(g).max() for g in by_path(value[0][0]).values())
    assert difference[0] < 1e-6 * largest, difference
    for plain, chunked in zip(*(jax.tree.leaves(value[c][1]) for c in (0, 4)), strict=True):
        np.testing.assert_allclose(chunked, plain, rtol=2e-6)


def test_train_fsdp_never_holds_all_parameters() -> None:
    """Neither in init nor in a step, rematerialization or not."""
    model = dataclasses.replace(MODEL, num_layers=8, embed_dim=128, mlp_dim=512, head_dim=16)
    program = program_of({"fsdp": 8}, model=model, global_batch_size=8, length=8)
    params = sum(4 * leaf.size for leaf in jax.tree.leaves(program.abstract_state.params))
    step, _ = compile_step(program)
    report = memory_report(step)
    assert report["argument_bytes"] < 1.2 * 3 * params / 8
    assert report["temp_bytes"] < params, (report, params)
    assert "f32[8,16,512]" in step.as_text()  # the shards of all layers, but never
    assert "f32[8,128,512]" not in step.as_text()

    init = jax.jit(program.init).lower(0).compile()
    report = memory_report(init)
    assert report["output_bytes"] < 1.2 * 3 * params / 8
    assert report["temp_bytes"] < params / 4, (report, params)


def test_train_init_is_the_same_on_any_mesh() -> None:
    states = []
    for sizes in ({}, {"fsdp": 8}, ALL2):
        program = program_of(sizes)
        init = jax.jit(program.init).lower(TRAIN.seed).compile()
        states.append(by_path(init(TRAIN.seed)))
    for path, array in states[0].items():
        for other in states[1:]:
            np.testing.assert_array_equal(other[path], array, err_msg=path, strict=True)
    assert np.std(states[0]["params/blocks/mlp/up/kernel"]) == pytest.approx(0.2, rel=0.05)
    # Layers differ, and so do parameters of one shape.
    up, gate = (states[0][f"params/blocks/mlp/{name}/kernel"] for name in ("up", "gate"))
    assert np.abs(up[0] - up[1]).max() > 0.1
    assert np.abs(up - gate).max() > 0.1
    another = program_of({}).init(TRAIN.seed + 1)
    assert largest_difference(another.params["embedding"], program.init(3).params["embedding"])[0]


@pytest.mark.parametrize("sizes", [{}, {"data": 4, "fsdp": 2}], ids=["one", "data4_fsdp2"])
def test_train_in_bfloat16_learns_the_same(sizes: dict[str, int]) -> None:
    """Within what bfloat16 can tell, whatever the layout and the accumulation."""
    half = dataclasses.replace(MODEL, param_dtype="bfloat16", compute_dtype="bfloat16")
    batches = [random_batch("ragged", seed=s) for s in range(3)]
    full = program_of({})
    first = jax.device_get(full.init(0))
    wanted, _ = run_steps(full, batches, state=put_state(full, first), step=compile_step(full)[0])
    program = program_of(sizes, model=half, grad_accumulation=4)
    step, log = compile_step(program)
    start = jax.tree.map(lambda x, s: x.astype(s.dtype), first, program.abstract_state)
    losses, state = run_steps(program, batches, state=put_state(program, start), step=step)
    np.testing.assert_allclose(losses, wanted, atol=0.03)
    assert losses[0] != losses[1]
    assert {str(p.dtype) for p in jax.tree.leaves(state.params)} == {"bfloat16"}
    moments = [m for m in jax.tree.leaves(state.opt_state) if m.ndim]
    assert {str(m.dtype) for m in moments} == {"float32"}
    assert "Involuntary" not in log


def test_train_gradients_of_low_precision_accumulate_in_float32() -> None:
    """512 microbatches whose gradients are equal: bfloat16 would stop adding up at 256."""
    program = program_of({"data": 8}, model=dataclasses.replace(MODEL, param_dtype="bfloat16"))

    def loss(params, batch):
        weight = jnp.sum(batch["weights"])
        value = params["w"].astype(jnp.float32) * weight
        return LossOutput(value, weight, {})

    weights = jnp.ones((8 * 512, 1))
    grads, sums = jax.jit(
        lambda w: sum_gradients(
            loss, {"w": w}, {"weights": weights}, num_microbatches=512, layout=program.layout
        )
    )(jnp.bfloat16(2))
    assert grads["w"].dtype == jnp.float32
    assert float(grads["w"]) == 1.0
    assert float(sums.loss_sum) == 2 * 8 * 512


def test_train_metrics_are_sums_over_the_batch() -> None:
    """Weights of zero count for nothing; a batch without any weight changes nothing but decay."""
    optimizer = OptimizerConfig(weight_decay=0.0)
    program = program_of(ALL2, optimizer=optimizer)
    step, _ = compile_step(program)
    state = program.init(0)
    start = by_path(state.params)
    batch = random_batch("ragged")
    state, metrics = step(state, put(program, batch))
    assert float(metrics["weight_sum"]) == batch["weights"].sum()
    assert float(metrics["accuracy"]) <= batch["weights"].sum()
    assert float(metrics["loss_sum"]) == pytest.approx(float(metrics["cross_entropy"]))
    nothing = {**batch, "weights": np.zeros_like(batch["weights"])}
    fresh = put_state(program, jax.tree.map(np.zeros_like, jax.device_get(state)))
    fresh = dataclasses.replace(fresh, params=jax.tree.map(jnp.copy, program.init(0).params))
    state, metrics = step(fresh, put(program, nothing))
    assert float(metrics["weight_sum"]) == float(metrics["loss_sum"]) == 0
    assert float(metrics["grad_norm"]) == 0
    assert largest_difference(state.params, start)[0] == 0


@pytest.mark.parametrize("mesh", [{}, {"data": 2}])
def test_program_evaluates_by_microbatches(mesh) -> None:
    """What fits while it trains fits while it is evaluated; the sums are the same."""
    sums, memory = [], []
    for most in (0, 2):
        program = program_of(mesh, max_device_batch=most)
        params, batch = program.init(0).params, put(program, random_batch("ragged"))
        step = program.eval_step.lower(params, batch).compile()
        memory.append(step.memory_analysis().temp_size_in_bytes)
        sums.append({name: float(x) for name, x in step(params, batch).items()})
    assert sums[1] == pytest.approx(sums[0], rel=1e-5)
    assert memory[1] < memory[0] / 2


def test_train_program_hands_its_options_to_the_compiler(monkeypatch):
    """Those of its platform and dtype, to the step and to the evaluation: XLA refuses this one."""
    asked = []

    def options(platform, *, compute_dtype):
        asked.append((platform, compute_dtype))
        return {"xla_no_such_option": "1"}

    monkeypatch.setattr(program_module, "program_options", options)
    program = program_of({}, model=dataclasses.replace(MODEL, compute_dtype="bfloat16"))
    assert asked == [("cpu", "bfloat16")]
    evaluation = program.eval_step.lower(program.abstract_state.eval_params, program.abstract_batch)
    for lowered in (program.lower_train_step(), evaluation):
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
            lowered.compile()
