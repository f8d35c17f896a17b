"""One layer of experts against a loop over tokens and experts, in NumPy and float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from moe_helpers import reference

from spmd_train.config import ModelConfig, MoEConfig
from spmd_train.nn.moe import MoE, update_bias
from spmd_train.nn.routing import route

MODEL = ModelConfig(embed_dim=12, mlp_dim=16, num_heads=2)
DEFAULT = MoEConfig(num_experts=8, top_k=2)
DEEPSEEK = MoEConfig(
    num_experts=6,
    top_k=3,
    expert_mlp_dim=10,
    num_shared_experts=2,
    shared_mlp_dim=4,
    scores="sigmoid",
    renormalize=False,
    routed_scale=2.5,
    balance="bias",
)
TIGHT = dataclasses.replace(DEFAULT, dispatch="capacity", capacity_factor=0.75)
CASES = {
    "mixtral": (MODEL, DEFAULT),
    "deepseek": (MODEL, DEEPSEEK),
    "gelu": (dataclasses.replace(MODEL, mlp="gelu"), dataclasses.replace(DEFAULT, top_k=1)),
    "capacity": (MODEL, TIGHT),
}
ROWS, LENGTH = 3, 16


def make(model: ModelConfig, moe: MoEConfig):
    """A layer with parameters far from even, its inputs, and the bias that the loop needs."""
    rng = np.random.default_rng(0)
    layer = MoE(model, moe, out_scale=0.3, rngs=nnx.Rngs(params=0))
    graphdef, state = nnx.split(layer)
    shapes = nnx.to_pure_dict(state)
    params = jax.tree.map(lambda p: rng.normal(0, 0.4, p.shape).astype(np.float32), shapes)
    bias = params.pop("bias", np.float32(0))
    x = rng.normal(0, 1, (ROWS, LENGTH, model.embed_dim)).astype(np.float32)
    is_token = np.arange(LENGTH) < np.array([LENGTH, 11, 0])[:, None]

    def apply(params, x):
        tree = params | ({"bias": bias} if moe.balance == "bias" else {})
        leaves = jax.tree.leaves(tree)
        merged = nnx.merge(graphdef, jax.tree.unflatten(jax.tree.structure(state), leaves))
        return merged(x, is_token_BT=jnp.asarray(is_token))

    return apply, params, x, is_token, bias


@pytest.mark.parametrize("case", CASES)
def test_moe_layer_matches_a_loop_over_experts(case):
    model, moe = CASES[case]
    apply, params, x, is_token, bias = make(model, moe)
    rng = np.random.default_rng(1)
    g = rng.normal(size=x.shape)

    def objective(out, stats):
        return (out * g).sum() + 3 * stats.balance.sum() + 0.1 * stats.z_squared.sum()

    @jax.jit
    def run(params, x):
        grads = jax.grad(lambda *args: objective(*apply(*args)), argnums=(0, 1))(params, x)
        return apply(params, x), grads

    (out, stats), grads = run(params, x)
    expected = reference(params, x, is_token, moe, bias)
    np.testing.assert_allclose(out, expected.out, rtol=1e-4, atol=1e-5)
    for name in ("balance", "z_squared", "load", "dropped"):
        np.testing.assert_allclose(getattr(stats, name), getattr(expected, name), rtol=1e-5)
    assert expected.load[:2].std() > 0.5, "an even load would hide mistakes"
    assert (expected.dropped.sum() > 0) == (moe.dispatch == "capacity")

    # Each leaf's gradient along a random direction against the loop's central difference.
    exact = jax.tree.map(np.float64, (params, x))
    leaves, structure = jax.tree.flatten(exact)
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(grads), strict=True)):
        direction = rng.normal(size=leaf.shape)
        moved = []
        for sign in (1, -1):
            at = [*leaves[:i], leaf + sign * 1e-6 * direction, *leaves[i + 1 :]]
            moved_params, moved_x = jax.tree.unflatten(structure, at)
            found = reference(moved_params, moved_x, is_token, moe, bias)
            np.testing.assert_array_equal(found.load, expected.load)
            moved.append(objective(found.out, found))
        slope = (moved[0] - moved[1]) / 2e-6
        assert np.vdot(grad, direction) == pytest.approx(slope, rel=2e-4, abs=2e-4)


def test_moe_capacity_matches_dropless_where_nothing_is_dropped():
    ample = dataclasses.replace(DEFAULT, dispatch="capacity", capacity_factor=4.0)
    results = []
    for moe in (DEFAULT, ample):
        apply, params, x, _, _ = make(MODEL, moe)
        results.append(
            jax.jit(jax.value_and_grad(lambda p, x, apply=apply: (apply(p, x)[0] ** 2).sum()))(
                params, x
            )
        )
        assert not apply(params, x)[1].dropped.any()
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_moe_capacity_never_drops_a_token_for_a_later_one():
    apply, params, x, _, _ = make(MODEL, TIGHT)
    whole = apply(params, x)[0]
    changed = np.where(np.arange(LENGTH)[:, None] < 9, x, -x)
    np.testing.assert_array_equal(apply(params, changed)[0][:, :9], whole[:, :9])


def test_moe_bias_evens_out_a_skewed_router():
    moe = dataclasses.replace(DEFAULT, scores="sigmoid", balance="bias", bias_update_speed=0.004)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 0.5, (16, 64, 8)) + np.linspace(2, -2, 8)
    is_token = jnp.ones((16, 64), bool)

    @jax.jit
    def load_of(bias):
        _, stats = route(
            jnp.asarray(logits, jnp.float32), bias_E=bias, is_token_BT=is_token, config=moe
        )
        return stats.load.sum(0)

    bias = jnp.zeros(8)
    uneven = load_of(bias)
    for _ in range(300):
        bias = update_bias(bias, load_of(bias), speed=moe.bias_update_speed)
    even = load_of(bias)
    assert uneven.max() > 3 * uneven.mean()
    assert even.max() < 1.1 * even.mean()
    assert even.min() > 0.9 * even.mean()
    assert even.sum() == uneven.sum() == 16 * 64 * 2
