"""Imported models compute what `transformers` computed: logits, loss and every gradient."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from interop_helpers import (
    EXPERT_FAMILIES,
    FAMILIES,
    REFERENCE,
    load,
    make_batch,
    make_reference_program,
    moe_config,
)
from interop_helpers import model_config as model_config_of
from safetensors.numpy import load_file

from spmd_train.interop import to_hf
from spmd_train.nn.attention import Tokens
from spmd_train.parallel.rules import use_layout

# Float32 noise of sums in another order; measured 5e-6 (logits, which are of size 1 to 5) and
# 3e-6 (gradients, of the largest of their tensor).
LOGITS_TOLERANCE = 2e-5
GRADIENT_TOLERANCE = 1e-5


def logits_of(program, params, tokens: Tokens, ids):
    with use_layout(program.layout):
        model = program.model.merge(params)
        hidden_BTD, _ = model(ids, tokens=tokens)
        return hidden_BTD @ model.head_kernel()


@pytest.mark.parametrize("family", FAMILIES + EXPERT_FAMILIES)
def test_interop_matches_transformers(family):
    hf_dir = REFERENCE / family
    config, moe = model_config_of(hf_dir), moe_config(hf_dir)
    expected = load_file(hf_dir / "expected.safetensors")
    mesh = "expert2 x tensor2" if moe.num_experts else "fsdp2 x tensor2"
    program = make_reference_program(config, moe=moe, mesh=mesh)
    params = load(program, hf_dir, config)

    for leaf, planned in zip(
        jax.tree.leaves(params), jax.tree.leaves(program.abstract_state.params), strict=True
    ):
        assert leaf.sharding == planned.sharding
    mlp = params["blocks"]["mlp"]
    kernel = (mlp["experts"] if moe.num_experts else mlp)["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4

    @jax.jit
    def compute(params, batch):
        def loss(params):
            with use_layout(program.layout):
                sums = program.model.task.loss(program.model.merge(params), batch, key=None)
                return sums.loss_sum / sums.weight_sum

        tokens = Tokens(batch["segment_ids"], batch["positions"])
        return logits_of(program, params, tokens, batch["tokens"]), jax.value_and_grad(loss)(params)

    logits, (value, grads) = compute(params, make_batch(program, expected["ids"]))
    np.testing.assert_allclose(logits, expected["logits"][:, :-1], rtol=0, atol=LOGITS_TOLERANCE)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-6)
    compared = set()
    for name, grad in to_hf(grads, config=config, moe=moe):
        wanted = expected[f"grad/{name}"]
        scale = np.abs(wanted).max()
        assert scale > 1e-3, name
        np.testing.assert_allclose(
            grad / scale, wanted / scale, rtol=0, atol=GRADIENT_TOLERANCE, err_msg=name
        )
        compared.add(f"grad/{name}")
    assert compared == {name for name in expected if name.startswith("grad/")}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_interop_packed_documents_match_each_alone(family):
    hf_dir = REFERENCE / family
    config = model_config_of(hf_dir)
    expected = load_file(hf_dir / "expected.safetensors")
    program = make_reference_program(config)
    params = load(program, hf_dir, config)

    # The beginnings of two rows of the fixture, packed in one.
    lengths = (13, 19)
    ids = np.concatenate([expected["ids"][row, :n] for row, n in enumerate(lengths)])[None]
    tokens = Tokens(
        np.repeat(np.int32([1, 2]), lengths)[None],
        np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None],
    )
    alone = np.concatenate([expected["logits"][row, :n] for row, n in enumerate(lengths)])
    compute = jax.jit(functools.partial(logits_of, program))
    packed = compute(params, tokens, ids)[0]
    np.testing.assert_allclose(packed, alone, rtol=0, atol=LOGITS_TOLERANCE)

    one_segment = Tokens(np.ones_like(tokens.segment_ids), np.arange(32, dtype=np.int32)[None])
    leaking = compute(params, one_segment, ids)[0]
    assert np.abs(leaking[13:] - alone[13:]).max() > 0.1
