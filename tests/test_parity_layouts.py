"""Every layout against one device: losses of five steps, and all parameters after them.

With teeth: a layout that did nothing fails (shards, collectives), and so does one that did more
than it should (collectives of another kind, arrays that XLA copied whole to reshard them).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from helpers import (
    MODEL,
    RESHARDED_WHOLE,
    SEQUENCE_SHARDED,
    check_learning,
    compile_step,
    no_compilation_cache,
    program_of,
    put,
    put_state,
    random_batch,
    reference,
    run_steps,
    stderr_of_xla,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import LossConfig, PipelineConfig, ShardingConfig
from spmd_train.inspect.collectives import count_collectives

MESHES = {
    "data8": {"data": 8},
    "fsdp8": {"fsdp": 8},
    "tensor8": {"tensor": 8},
    "data2_fsdp2_tensor2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data4_tensor2": {"data": 4, "tensor": 2},
    "fsdp4_tensor2": {"fsdp": 4, "tensor": 2},
}
EVERYTHING = dataclasses.replace(
    MODEL,
    num_heads=16,
    num_kv_heads=8,
    tied_head=True,
    dropout=0.1,
    remat="projections",
    qk_norm=True,
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    logit_softcap=20.0,
)
GPT2 = dataclasses.replace(
    MODEL,
    norm="layernorm",
    positions="learned",
    max_positions=64,
    mlp="gelu",
    attention_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
    remat="full",
    scan_unroll=2,
    attention_softcap=5.0,
)
VARIANTS = {
    # Name: model, loss, batch.
    "packed": (MODEL, LossConfig(), "packed"),
    "ragged": (MODEL, LossConfig(), "ragged"),
    "everything": (EVERYTHING, LossConfig(z_loss=1e-2, chunk_tokens=8), "ragged"),
    "gpt2": (GPT2, LossConfig(z_loss=1e-2), "packed"),
}


def cases(variant: str, *wanted: str) -> list[tuple[str, str, int, bool]]:
    """(variant, mesh, accumulation, sequence sharded) out of 'mesh/accumulation[/sequence]'."""
    split = [case.split("/") for case in wanted]
    return [(variant, mesh, int(n), bool(rest)) for mesh, n, *rest in split]


QUICK_CASES = [
    *cases("packed", "data8/1", "data8/4", "fsdp8/1", "fsdp8/4"),
    *cases("packed", "tensor8/1", "tensor8/1/seq", "tensor8/4", "tensor8/4/seq"),
    *cases("packed", "data2_fsdp2_tensor2/1", "data2_fsdp2_tensor2/1/seq"),
    *cases("packed", "data2_fsdp2_tensor2/4", "data2_fsdp2_tensor2/4/seq"),
    *cases("packed", "data4_tensor2/4", "fsdp4_tensor2/1/seq"),
    *cases("everything", "data8/4", "fsdp8/1", "data2_fsdp2_tensor2/4/seq"),
    *cases("gpt2", "data2_fsdp2_tensor2/1"),
    *cases("ragged", "fsdp4_tensor2/4"),
]
SLOW_CASES = [
    case
    for variant in VARIANTS
    for mesh, sizes in MESHES.items()
    for accumulation in (1, 4)
    for sequence in (False, True)
    if (case := (variant, mesh, accumulation, sequence)) not in QUICK_CASES
    and (not sequence or "tensor" in sizes)
]


# Rules of the user's own: name, mesh, model, sharding, accumulation.
OWN_RULES = {
    "fewer_kv_heads_than_tensor": (
        {"data": 2, "tensor": 4},
        dataclasses.replace(MODEL, num_kv_heads=2),
        ShardingConfig(rules={"kv_heads": "none", "residual_sequence": "tensor"}),
        1,
    ),
    "embed_over_data": (
        {"data": 4, "fsdp": 2},
        MODEL,
        ShardingConfig(rules={"embed": "data+fsdp"}),
        4,
    ),
    "overrides": (
        {"data": 2, "fsdp": 2, "tensor": 2},
        dataclasses.replace(MODEL, positions="learned", max_positions=64),
        ShardingConfig(
            overrides={
                "positions/table": "fsdp",
                "embedding/table": "none,data",
                "blocks/mlp/up/kernel": "none,data+fsdp",
                "head/kernel": "tensor,fsdp",
            }
        ),
        4,
    ),
}


def name_of(case: tuple[str, str, int, bool]) -> str:
    variant, mesh, accumulation, sequence = case
    return f"{variant}-{mesh}-x{accumulation}" + "-seq" * sequence


def check_parity(variant: str, mesh: str, accumulation: int, sequence: bool) -> None:
    model, loss, kind = VARIANTS[variant]
    sizes = MESHES[mesh]
    _, first, _, _ = reference(model, loss, kind)
    program = program_of(
        sizes,
        model=model,
        loss=loss,
        sharding=SEQUENCE_SHARDED if sequence else ShardingConfig(),
        grad_accumulation=accumulation,
    )
    step, log = compile_step(program)
    check_shards(program, put_state(program, first), sizes)
    check_collectives(step.as_text(), program.mesh.shape, sequence=sequence)
    assert RESHARDED_WHOLE not in log, log
    check_learning(program, step, reference(model, loss, kind))


def check_shards(program, state, sizes) -> None:
    """A device has its part of the batch, of every matrix, and of the moments of each."""
    shards = sizes.get("fsdp", 1) * sizes.get("tensor", 1)
    matrices = 0
    for path, array in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("/kernel", "/table")):
            matrices += 1
            # Learned positions are not split over tensor.
            parts = sizes.get("fsdp", 1) if "positions" in name else shards
            assert array.addressable_shards[0].data.size * parts == array.size, name
    assert matrices >= 3 * 7  # parameters and two moments
    tokens = put(program, random_batch())["tokens"]
    rows = tokens.addressable_shards[0].data.shape[0]
    assert rows * sizes.get("data", 1) * sizes.get("fsdp", 1) == tokens.shape[0]


def check_collectives(text: str, axis_sizes, *, sequence: bool) -> None:
    """The collectives that the layout needs are there, and no others."""
    axes = {a for a, size in axis_sizes.items() if size > 1}
    found = count_collectives(text, axis_sizes=axis_sizes)
    assert all(c.count is not None and not c.conditional for c in found)
    kinds = {(c.op, c.axes) for c in found}

    needed = {("all-reduce", (axis,)) for axis in axes}
    allowed = set(needed)
    if "fsdp" in axes:
        needed |= {("all-gather", ("fsdp",))}
        # Of the embedding: its gradient, or where tokens are few, their vectors.
        embedding = {("reduce-scatter", ("fsdp",)), ("all-to-all", ("fsdp",))}
        assert kinds & embedding, kinds
        allowed |= embedding
    if sequence:
        needed |= {("all-gather", ("tensor",))}
        allowed |= {("reduce-scatter", ("tensor",))}
    assert needed <= kinds, needed - kinds
    # What every device has a part of, such as the gradient's norm, is summed over several axes.
    several = {(op, over) for op, over in kinds if op == "all-reduce" and set(over) <= axes}
    assert kinds <= needed | allowed | several, kinds - needed - allowed - several
    summed = [c.bytes_each for c in found if len(c.axes) > 1]
    assert sum(summed) < 8192, summed


@pytest.mark.parametrize("case", QUICK_CASES, ids=name_of)
def test_parity_with_one_device(case: tuple[str, str, int, bool]) -> None:
    check_parity(*case)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW_CASES, ids=name_of)
def test_parity_with_one_device_in_full(case: tuple[str, str, int, bool]) -> None:
    check_parity(*case)


@pytest.mark.parametrize("name", OWN_RULES)
def test_parity_of_rules_of_ones_own(name: str) -> None:
    sizes, model, sharding, accumulation = OWN_RULES[name]
    program = program_of(sizes, model=model, sharding=sharding, grad_accumulation=accumulation)
    step, log = compile_step(program)
    assert RESHARDED_WHOLE not in log, log
    check_learning(program, step, reference(model, LossConfig(), "packed"))


BFLOAT16: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "one_device": ({}, {}),
    "sequence_sharded": (
        MESHES["data2_fsdp2_tensor2"],
        {
            "loss": LossConfig(chunk_tokens=8),
            "sharding": SEQUENCE_SHARDED,
            "grad_accumulation": 2,
        },
    ),
    "pipeline": (
        {"pipeline": 2, "tensor": 2},
        {"pipeline": PipelineConfig(schedule="zero_bubble", num_microbatches=2)},
    ),
    "context": ({"context": 2, "data": 2}, {}),
}


@pytest.mark.parametrize("name", BFLOAT16)
def test_parity_bfloat16_compute_stays_near_float32(name: str) -> None:
    """bfloat16 has 3 digits, and XLA's CPU compiler aborts on some sums of it over devices."""
    sizes, changes = BFLOAT16[name]
    model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
    program = program_of(sizes, model=model, **changes)
    batches, first, wanted, _ = reference(MODEL, LossConfig(), "packed")
    step, _ = compile_step(program)
    losses, _ = run_steps(program, batches, state=put_state(program, first), step=step)
    assert 0 < np.abs(losses - wanted).max() < 0.02


def test_parity_sees_what_xla_copies_whole_to_reshard_it() -> None:
    """The warning that the proofs above look for is there when it should be."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def reshard(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x + 1, NamedSharding(mesh, P(None, "a")))
        return jax.lax.with_sharding_constraint(x + 1, NamedSharding(mesh, P("b")))

    lowered = jax.jit(reshard).lower(jax.ShapeDtypeStruct((6, 6), np.float32))
    with no_compilation_cache(), stderr_of_xla() as log:
        lowered.compile()
    assert RESHARDED_WHOLE in log[0]
