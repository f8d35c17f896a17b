"""Training with split sequences against one device."""

import dataclasses
import functools
import math
import re

import helpers
import jax
import numpy as np
import pytest
from helpers import (
    CAPACITY,
    MODEL,
    SEQUENCE_SHARDED,
    largest_difference,
    put,
    random_batch,
    run_steps,
)

from spmd_train.config import ConfigError, ContextConfig, LossConfig, ShardingConfig
from spmd_train.inspect.collectives import count_collectives
from spmd_train.inspect.context import context_report
from spmd_train.train.generate import Sampling, generate

SIZE = 16
METHODS = ("ring", "all_gather", "ulysses")
PLACEMENTS = ("zigzag", "contiguous")
MESHES = {
    "context4": ({"context": 4}, {}),
    "context2_data2_tensor2": ({"context": 2, "data": 2, "tensor": 2}, {}),
    "context2_fsdp2_accumulated": ({"context": 2, "fsdp": 2}, {"grad_accumulation": 2}),
    "context2_data2_tensor2_accumulated": (
        {"context": 2, "data": 2, "tensor": 2},
        {"grad_accumulation": 2},
    ),
}
MODELS = {
    "plain": MODEL,
    # More rows in the embedding than a device has tokens: vectors travel, not the table.
    "vocabulary": dataclasses.replace(MODEL, vocab_size=1024),
    "all": dataclasses.replace(
        MODEL,
        num_kv_heads=4,
        sliding_window=12,
        attention_softcap=8.0,
        positions="learned",
        dropout=0.1,
        remat="projections",
    ),
}
program_of = functools.partial(helpers.program_of, global_batch_size=SIZE)


def batches(steps=2):
    return [random_batch(seed=seed, size=SIZE) for seed in range(steps)]


@functools.cache
def one_device(model):
    program = program_of({}, model=MODELS[model])
    losses, state = run_steps(program, batches())
    metrics = program.eval_step(state.params, put(program, batches()[0]))
    return losses, jax.device_get(state), jax.device_get(metrics)


def check(mesh, *, model="plain", method="ring", placement="zigzag", **options):
    program = program_of(
        mesh,
        model=MODELS[model],
        context=ContextConfig(method=method, placement=placement),
        **options,
    )
    losses, state = run_steps(program, batches())
    expected_losses, expected, expected_metrics = one_device(model)
    np.testing.assert_allclose(losses, expected_losses, rtol=2e-6)
    difference, where = largest_difference(state.params, expected.params)
    assert difference < 2e-5, where
    metrics = program.eval_step(state.params, put(program, batches()[0]))
    assert float(metrics["loss_sum"]) == pytest.approx(
        float(expected_metrics["loss_sum"]), rel=1e-5
    )
    return program


@pytest.mark.parametrize(
    "name, method, placement",
    [
        ("context4", "ring", "zigzag"),
        ("context2_data2_tensor2_accumulated", "ring", "zigzag"),
        ("context2_data2_tensor2", "all_gather", "contiguous"),
        ("context2_fsdp2_accumulated", "ulysses", "zigzag"),
    ],
)
def test_context_training_is_one_devices(name, method, placement):
    mesh, options = MESHES[name]
    check(mesh, method=method, placement=placement, **options)


def test_context_training_with_every_feature_is_one_devices():
    """Window, soft cap, fewer key heads, learned positions, dropout, remat, chunked loss."""
    check(
        {"context": 2, "data": 2, "tensor": 2},
        model="all",
        grad_accumulation=2,
        loss=LossConfig(chunk_tokens=8),
        sharding=SEQUENCE_SHARDED,
    )


@pytest.mark.parametrize("rules, shards", [({}, 4), ({"embed": "fsdp"}, 2)])
def test_context_training_with_parameters_sharded_or_copied_is_one_devices(rules, shards):
    program = check(
        {"context": 2, "fsdp": 2},
        model="vocabulary",
        sharding=ShardingConfig(rules=rules),
        grad_accumulation=2,
    )
    plan = program.plans["params/blocks/mlp/up/kernel"]
    assert plan.bytes_per_device == plan.bytes / shards


@pytest.mark.slow
@pytest.mark.parametrize("model", ["plain", "all"])
@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("method", METHODS)
def test_context_training_matrix_is_one_devices(method, placement, name, model):
    mesh, options = MESHES[name]
    check(mesh, model=model, method=method, placement=placement, **options)


@functools.cache
def compiled(method, placement="zigzag"):
    model = dataclasses.replace(MODEL, num_kv_heads=4)
    program = program_of(
        {"context": 4}, model=model, context=ContextConfig(method=method, placement=placement)
    )
    return program, program.lower_train_step().compile()


@pytest.mark.parametrize(
    "method, ops",
    [
        ("ring", {"collective-permute"}),
        ("all_gather", {"all-gather", "reduce-scatter"}),
        ("ulysses", {"all-to-all", "all-gather"}),
    ],
)
def test_context_training_sends_what_the_formula_says(method, ops):
    program, step = compiled(method)
    found = count_collectives(step.as_text(), axis_sizes=program.mesh.shape)
    attention = [c for c in found if f"attention/{method}" in c.scope]
    assert {c.op for c in attention} == ops
    # Nothing else crosses devices but batches being placed, and what FSDP sends.
    assert {c.axes for c in found} == {("context",)}
    rest = {c.op for c in found if c not in attention}
    assert rest == {"collective-permute", "all-gather", "all-reduce", "reduce-scatter"}
    report = context_report(
        dataclasses.replace(MODEL, num_kv_heads=4),
        program.layout,
        length=helpers.LENGTH,
        rows=SIZE,
        passes=1,
    )
    sent = sum(c.wire_bytes for c in attention)
    assert report["step_bytes"] / 1.1 < sent < report["step_bytes"] * 1.1


def test_context_training_shards_are_smaller():
    program, _ = compiled("ring")
    tokens = put(program, batches()[0])["tokens"]
    assert {s.data.shape for s in tokens.addressable_shards} == {(SIZE, helpers.LENGTH // 4)}


def test_context_of_one_device_costs_nothing():
    """No method or placement changes the program of a mesh that does not split sequences."""
    texts = {
        program_of({"data": 2}, context=ContextConfig(method=method, placement=placement))
        .lower_train_step()
        .as_text()
        for method, placement in (("ring", "zigzag"), ("ulysses", "contiguous"))
    }
    assert len(texts) == 1
    assert not {"collective_permute", "all_to_all", "manual_computation"} & set(
        texts.pop().replace("(", " ").replace('"', " ").split()
    )


def test_context_generates_with_experts_that_are_full():
    """The order of tokens decides who is served; prompts are in their own."""
    experts = dataclasses.replace(CAPACITY, capacity_factor=0.6)
    prompt = [[int(n) for n in np.random.default_rng(0).integers(1, 64, 16)] for _ in range(2)]
    greedy = Sampling(temperature=0.0)
    texts = []
    for mesh in ({"context": 2}, {}):
        program = program_of(mesh, moe=experts, num_steps=1)
        params = program.init(0).params
        texts.append(generate(program, params, prompt, max_new_tokens=6, sampling=greedy))
    assert texts[0] == texts[1]


def test_context_generates_what_one_device_does():
    program = program_of({"context": 4})
    alone = program_of({})
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    greedy = Sampling(temperature=0.0)
    texts = [
        generate(p, p.init(0).params, prompts, max_new_tokens=7, sampling=greedy)
        for p in (program, alone)
    ]
    assert texts[0] == texts[1]


def test_context_length_that_does_not_divide_is_an_error_before_compiling():
    with pytest.raises(ConfigError, match=r"sequence_length: 36 .* 8 blocks; .* 32 and 40"):
        program_of({"context": 4}, length=36)


def test_context_long_sequence_takes_memory_of_its_share_only():
    """131,072 tokens in one layer, compiled for 8 devices and for 2, not run."""
    length = 2**17
    model = dataclasses.replace(MODEL, num_layers=1, num_heads=2, head_dim=16, remat="full")

    def temp_bytes(devices):
        program = helpers.program_of(
            {"context": devices},
            model=model,
            length=length,
            global_batch_size=1,
            loss=LossConfig(chunk_tokens=1024),
        )
        step = program.lower_train_step().compile()
        shapes = re.findall(r"\w+\[([\d,]+)\]", step.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        # Nothing is larger than what the widest projection of a device's tokens makes.
        assert largest <= length // devices * model.mlp_dim
        return step.memory_analysis().temp_size_in_bytes

    on_eight, on_two = temp_bytes(8), temp_bytes(2)
    # 40 arrays as large as a device's residual stream; on one device 8 times as large.
    assert on_eight < 40 * length // 8 * model.embed_dim * 4
    assert on_two > 3 * on_eight
