"""Experts on any mesh learn what one device learns: losses of k steps, all parameters, the bias."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from helpers import (
    BIAS,
    CAPACITY,
    DROPLESS,
    LENGTH,
    MODEL,
    ROUNDS,
    TRAIN,
    largest_difference,
    program_of,
    random_batch,
    run_steps,
)

from spmd_train.config import MoEConfig, OptimizerConfig
from spmd_train.inspect.collectives import count_collectives

# Every sum is made in another order. Measured on 8 devices after 2 steps: losses (near 5, where a
# float32 has 5e-7) 3.2e-6, parameters (of size 0.2) 2e-6.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 5e-6, 1e-5
STEPS = 2


def batches(kind: str):
    return [random_batch(kind, seed=i) for i in range(STEPS)]


@functools.cache
def one_device(moe: MoEConfig, kind: str):
    return run_steps(program_of({}, moe=moe), batches(kind))


def check(moe: MoEConfig, mesh: dict[str, int], kind: str, **changes):
    program = program_of(mesh, moe=moe, **changes)
    losses, state = run_steps(program, batches(kind))
    expected, expected_state = one_device(moe, kind)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=LOSS_TOLERANCE)
    worst, path = largest_difference(state.params, expected_state.params)
    assert worst < PARAMETER_TOLERANCE, path
    if moe.balance == "bias":
        bias = state.model_state["blocks"]["mlp"]["bias"]
        assert np.abs(bias).max() > moe.bias_update_speed
        np.testing.assert_array_equal(bias, expected_state.model_state["blocks"]["mlp"]["bias"])
    else:
        assert not jax.tree.leaves(state.model_state)

    kernel = state.params["blocks"]["mlp"]["experts"]["up"]["kernel"]
    shards = np.prod([mesh.get(axis, 1) for axis in ("expert", "fsdp", "tensor")])
    assert kernel.addressable_shards[0].data.size == kernel.size // shards
    if mesh.get("expert", 1) > 1:
        assert kernel.addressable_shards[0].data.shape[1] == moe.num_experts // mesh["expert"]
    return program


def check_collectives(program, moe: MoEConfig):
    """Tokens travel over the expert axis only; experts are never gathered over it."""
    compiled = program.lower_train_step().compile()
    found = count_collectives(compiled.as_text(), axis_sizes=program.mesh.shape)
    to_all = [c for c in found if c.op == "all-to-all"]
    assert to_all
    assert {c.axes for c in to_all} == {("expert",)}
    gathered = [c for c in found if c.op == "all-gather" and "expert" in c.axes]
    kernel = MODEL.embed_dim * moe.expert_width(MODEL) * 4
    assert all(c.bytes_each < moe.num_experts * kernel for c in gathered)


def test_moe_parallel_dropless_matches_one_device():
    mesh = {"fsdp": 2, "expert": 2, "tensor": 2}
    program = check(BIAS, mesh, "ragged", grad_accumulation=2)
    check_collectives(program, BIAS)


def test_moe_parallel_capacity_matches_one_device():
    check(CAPACITY, {"data": 2, "expert": 4}, "packed", grad_accumulation=2)


MATRIX = [
    (DROPLESS, {"expert": 4}, "plain", {}),
    (DROPLESS, {"expert": 8}, "ragged", {}),
    (DROPLESS, {"data": 4}, "packed", {"grad_accumulation": 4}),
    (DROPLESS, {"fsdp": 2, "tensor": 4}, "packed", {"grad_accumulation": 2}),
    (DROPLESS, {"expert": 2, "data": 2, "tensor": 2}, "packed", {}),
    (DROPLESS, {"expert": 2, "data": 2, "tensor": 2}, "ragged", {"grad_accumulation": 4}),
    (DROPLESS, {"expert": 2, "context": 2}, "ragged", {}),
    (ROUNDS, {"expert": 4, "data": 2}, "ragged", {"grad_accumulation": 2}),
    (ROUNDS, {"fsdp": 2, "expert": 2, "tensor": 2}, "packed", {}),
    (BIAS, {"expert": 4, "data": 2}, "packed", {"grad_accumulation": 4}),
    (CAPACITY, {"fsdp": 2, "expert": 2, "tensor": 2}, "ragged", {"grad_accumulation": 2}),
    (CAPACITY, {"expert": 4}, "ragged", {}),
    (CAPACITY, {"expert": 2, "context": 2}, "packed", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("moe", "mesh", "kind", "changes"), MATRIX)
def test_moe_parallel_matrix_matches_one_device(moe, mesh, kind, changes):
    program = check(moe, mesh, kind, **changes)
    if "expert" in mesh:
        check_collectives(program, moe)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots", "projections"])
def test_moe_parallel_remat_changes_nothing(remat):
    check(
        ROUNDS,
        {"data": 2, "expert": 2, "tensor": 2},
        "ragged",
        model=dataclasses.replace(MODEL, remat=remat),
        grad_accumulation=2,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_moe_parallel_optimizers_match_one_device(name):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, epsilon=1e-4)
    runs = [
        run_steps(program_of(mesh, moe=DROPLESS, optimizer=optimizer), batches("packed"))
        for mesh in ({}, {"fsdp": 2, "expert": 2})
    ]
    np.testing.assert_allclose(runs[1][0], runs[0][0], rtol=0, atol=LOSS_TOLERANCE)
    worst, path = largest_difference(runs[1][1].params, runs[0][1].params)
    assert worst < PARAMETER_TOLERANCE, path


def test_moe_parallel_bfloat16_runs():
    model = dataclasses.replace(MODEL, num_layers=1, compute_dtype="bfloat16")
    program = program_of({"expert": 2, "tensor": 2}, moe=DROPLESS, model=model)
    losses, _ = run_steps(program, batches("packed"))
    reference, _ = run_steps(program_of({}, moe=DROPLESS, model=model), batches("packed"))
    np.testing.assert_allclose(losses, reference, rtol=2e-3)
    assert jax.tree.leaves(program.abstract_state.params)[0].dtype == np.float32


def test_moe_parallel_remat_keeps_what_experts_made():
    """With their outputs a backward pass need not send the tokens to them again."""
    exchanges = {}
    for remat in ("none", "dots", "projections", "full"):
        model = dataclasses.replace(MODEL, remat=remat)
        program = program_of({"expert": 2}, moe=DROPLESS, model=model)
        exchanges[remat] = program.lower_train_step().as_text().count("all_to_all")
    assert exchanges["dots"] == exchanges["projections"] == exchanges["none"] < exchanges["full"]


def test_moe_parallel_counts_and_routes_in_float32():
    """Accelerators round what they multiply by default; a count over 256 would not be whole."""
    text = program_of({"context": 2}, moe=CAPACITY).lower_train_step().as_text()
    exact = re.findall(r"dot_general.*precision = \[HIGHEST, HIGHEST\].*-> tensor<(\S+)>", text)
    size, experts, blocks = TRAIN.global_batch_size, CAPACITY.num_experts, 4
    assert f"{size}x{LENGTH}x{experts}xf32" in exact, "the router's logits"
    assert f"{blocks}x{size}x{experts}xf32" in exact, "tokens that experts had in blocks before"
