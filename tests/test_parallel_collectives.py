"""What a step sends, counted in the compiled program and held against formulas written here.

Sizes are bytes on one device. XLA's CPU compiler makes no reduce-scatter of its own: a gradient
that it sums over shards is an all-reduce (and a slice), those that `parallel/manual.py` sums are
reduce-scatters. Nor does it add the gradients of a block's inputs (from query, key and value; from
gate and up) before it sums them over tensor, as the TPU compiler does.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import jax
import numpy as np
import pytest
from helpers import (
    LENGTH,
    LOSS_TOLERANCE,
    MODEL,
    PARAMS_TOLERANCE,
    SEQUENCE_SHARDED,
    TRAIN,
    compile_step,
    largest_difference,
    param_shapes,
    program_of,
    put_state,
    random_batch,
    run_steps,
)

from spmd_train.config import ShardingConfig
from spmd_train.inspect.collectives import count_collectives

Payload = Mapping[tuple[str, tuple[str, ...]], float]
LAYERS = MODEL.num_layers
TOKENS = TRAIN.global_batch_size * LENGTH
FLOAT = 4


def gradient_bytes() -> tuple[int, int, int, int]:
    """Float32 gradients of the blocks' matrices, the embedding, the head, and all norms."""
    blocks = embedding = head = norms = 0
    for path, leaf in param_shapes(MODEL).items():
        size = FLOAT * leaf.size
        if path.endswith("/scale"):
            norms += size
        elif path.startswith("blocks/"):
            blocks += size
        elif path.startswith("head/"):
            head += size
        else:
            embedding += size
    return blocks, embedding, head, norms


def predicted(sizes: Mapping[str, int], *, accumulation: int, sequence: bool) -> Payload:
    """Bytes that go into an all-reduce or a reduce-scatter, or come out of an all-gather."""
    data, fsdp, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "tensor"))
    blocks, embedding, head, norms = gradient_bytes()
    payload: Counter[tuple[str, tuple[str, ...]]] = Counter()
    if fsdp > 1:
        # Each layer's matrices for its forward and its backward pass; the others once.
        payload["all-gather", ("fsdp",)] = (accumulation * 2 * blocks + head) / tensor
        payload["all-reduce", ("fsdp",)] = accumulation * (blocks + head) / tensor
        own = TOKENS / (accumulation * data * fsdp)
        if own * tensor <= MODEL.vocab_size:
            # Fewer tokens than rows: their ids, and their vectors and gradients instead.
            payload["all-gather", ("fsdp",)] += accumulation * own * fsdp * 4
            payload["all-to-all", ("fsdp",)] = accumulation * 2 * own * MODEL.embed_dim * FLOAT
        else:
            payload["all-gather", ("fsdp",)] += embedding / tensor
            payload["reduce-scatter", ("fsdp",)] = accumulation * embedding / tensor
    if data > 1:
        # Once per step, and only the shards that a device keeps.
        payload["all-reduce", ("data",)] = (blocks + embedding + head) / (fsdp * tensor)
    if data > 1 and (fsdp == 1 or accumulation > 1):
        payload["all-reduce", ("data",)] += norms
    if tensor > 1:
        activation = TOKENS / (data * fsdp) * MODEL.embed_dim * FLOAT
        # Forward: attention's and MLP's outputs. Backward: inputs of query, key, value, gate, up.
        # The embedding's output, the head's input; over the vocabulary two maxima and two sums.
        payload["all-reduce", ("tensor",)] = (LAYERS * (2 + 5) + 2) * activation
        payload["all-reduce", ("tensor",)] += 4 * TOKENS / (data * fsdp) * FLOAT
        if sequence:
            payload["all-reduce", ("tensor",)] += accumulation * norms
            # Inputs of attention and MLP, gradients of their outputs; the last norm's output, the
            # gradient of the embedding's.
            payload["all-gather", ("tensor",)] = (LAYERS * 4 + 2) * activation
    return payload


def wire_bytes(payload: Payload, sizes: Mapping[str, int]) -> float:
    """What a device sends: ring algorithms over n devices."""
    total = 0.0
    for (op, axes), size in payload.items():
        n = 1
        for axis in axes:
            n *= sizes[axis]
        total += size * (n - 1) / n * (2 if op == "all-reduce" else 1)
    return total


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("sizes", "sequence"),
    [
        ({"data": 8}, False),
        ({"fsdp": 8}, False),
        ({"tensor": 8}, False),
        ({"tensor": 8}, True),
        ({"data": 2, "fsdp": 2, "tensor": 2}, False),
        ({"data": 2, "fsdp": 2, "tensor": 2}, True),
    ],
    ids=["data8", "fsdp8", "tensor8", "tensor8_sequence", "all2", "all2_sequence"],
)
def test_collectives_send_what_the_formula_says(
    sizes: dict[str, int], accumulation: int, sequence: bool
) -> None:
    sharding = SEQUENCE_SHARDED if sequence else ShardingConfig()
    program = program_of(sizes, sharding=sharding, grad_accumulation=accumulation)
    found = count_collectives(compile_step(program)[0].as_text(), axis_sizes=program.mesh.shape)
    counted: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for c in found:
        counted[c.op, c.axes] += c.bytes or 0

    expected = predicted(sizes, accumulation=accumulation, sequence=sequence)
    print(f"\n{sizes}, {accumulation} microbatches, sequence sharding {sequence}")
    for op, axes in sorted(counted | Counter(expected)):
        size = expected.get((op, axes), 0)
        print(f"{op:15} {'+'.join(axes):12} {counted[op, axes]:10,} bytes, formula {size:10,.0f}")
    sent, formula = sum(c.wire_bytes or 0 for c in found), wire_bytes(expected, sizes)
    print(f"{sent:,} wire bytes, formula {formula:,.0f}: {sent / formula:.3f} times")

    # Beside the formula: scalars, and the gradients of norms where they go with something else.
    slack = 128 if sizes.keys() == {"data"} else accumulation * 1000
    for key in counted | Counter(expected):
        assert 0 <= counted[key] - expected.get(key, 0) <= slack, key
    assert 1 <= sent / formula < 1.1


def test_collectives_of_data_parallelism_do_not_grow_with_accumulation() -> None:
    """Each gradient is reduced once per step: no collective is in the loop over microbatches."""
    blocks, embedding, head, norms = gradient_bytes()
    for accumulation in (2, 8):
        program = program_of({"data": 4}, grad_accumulation=accumulation)
        found = count_collectives(compile_step(program)[0].as_text(), axis_sizes=program.mesh.shape)
        assert {(c.op, c.axes, c.count, c.dtype) for c in found} == {
            ("all-reduce", ("data",), 1, "f32")
        }
        reduced = sum(c.bytes_each for c in found)
        assert 0 <= reduced - (blocks + embedding + head + norms) <= 128


@pytest.mark.parametrize(("mesh", "devices"), [({"fsdp": 4}, 4), ({"fsdp": 2, "tensor": 2}, 2)])
def test_collectives_send_vectors_of_few_tokens_and_not_the_table(mesh, devices) -> None:
    model = dataclasses.replace(MODEL, vocab_size=1024)
    batches = [random_batch(seed=seed, size=8, vocab_size=1024) for seed in range(3)]
    single = program_of({}, model=model, global_batch_size=8)
    first = jax.device_get(single.init(0))
    expected, last = run_steps(single, batches, state=put_state(single, first))
    program = program_of(mesh, model=model, global_batch_size=8)
    step, _ = compile_step(program)
    losses, state = run_steps(program, batches, state=put_state(program, first), step=step)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=LOSS_TOLERANCE)
    assert largest_difference(state.params, last.params)[0] < PARAMS_TOLERANCE

    sent: Counter[str] = Counter()
    for c in count_collectives(step.as_text(), axis_sizes=program.mesh.shape):
        if c.axes == ("fsdp",) and c.scope.endswith("/embed"):
            sent[c.op] += c.bytes or 0
    own = 8 * LENGTH // devices
    # Everyone's ids; the vectors of a device's own tokens, there and their gradients back.
    assert sent == {
        "all-gather": 4 * 8 * LENGTH,
        "all-to-all": 2 * FLOAT * own * MODEL.embed_dim,
    }
