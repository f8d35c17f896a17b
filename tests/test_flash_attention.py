"""The platforms' attention kernels, interpreted on CPU, against plain JAX; and who gets them."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    MODEL,
    PARAMS_TOLERANCE,
    largest_difference,
    program_of,
    put_state,
    random_batch,
    run_steps,
)
from test_context_attention import plain

from spmd_train.config import ConfigError, ShardingConfig, parse
from spmd_train.experiment import build
from spmd_train.inspect.hlo import clean_op_name
from spmd_train.nn import flash, triton
from spmd_train.nn.attention import Tokens, attend
from spmd_train.nn.splash import Splash
from spmd_train.nn.triton import Triton
from spmd_train.parallel.by_kernel import Scoring, kernel_flops
from spmd_train.parallel.placement import Placement
from spmd_train.plan.dot_flops import told_flops

KERNELS = {"splash": Splash(interpret=True), "triton": Triton(interpret=True)}
CASES = {
    "splash": ("splash", 4, {}),
    "splash-groups": ("splash", 2, {}),
    "splash-softcap": ("splash", 4, {"softcap": 3.0}),
    "splash-window": ("splash", 2, {"window": 100}),
    "triton": ("triton", 4, {}),
    "triton-groups": ("triton", 2, {}),
    "triton-softcap": ("triton", 4, {"softcap": 3.0}),
    "triton-window": ("triton", 2, {"window": 100}),
}
B, T = 2, 256
K = 24
"""Not a power of two: kernels pad it."""


def arrays(num_kv_heads):
    """Queries, keys, values, a gradient, and packed documents whose borders no block has."""
    rng = np.random.default_rng(num_kv_heads)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(B, T, h, K)), jnp.float32)
        for h in (4, num_kv_heads, num_kv_heads, 4)
    )
    begins = rng.random((B, T)) < 5 / T
    begins[:, 0] = True
    positions = np.arange(T) - np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)
    ids = jnp.asarray(np.cumsum(begins, axis=1), jnp.int32)
    assert int(ids.max()) > 2
    return q, k, v, g, Tokens(ids, jnp.asarray(positions, jnp.int32))


@pytest.mark.parametrize("case", CASES)
def test_flash_kernels_do_what_blocks_do(case, monkeypatch):
    name, num_kv_heads, scoring = CASES[case]
    *qkvg, tokens = arrays(num_kv_heads)
    expected = plain(*qkvg, tokens, method="blocks", **scoring)
    monkeypatch.setitem(flash.KERNELS, "cpu", KERNELS[name])
    got = plain(*qkvg, tokens, method="flash", **scoring)
    for ours, theirs in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)
    # The documents matter: a kernel that looks across their borders does something else.
    one = Tokens(jnp.ones_like(tokens.segment_ids), jnp.broadcast_to(jnp.arange(T), (B, T)))
    across = plain(*qkvg, one, method="flash", **scoring)[0]
    assert float(jnp.abs(across - got[0]).max()) > 0.1


def test_flash_is_taken_where_a_kernel_can(monkeypatch):
    q, k, v, _, tokens = arrays(4)

    def traced(method, length=T, **scoring):
        def run(q, k, v):
            short = Tokens(*(x[:, :length] for x in tokens))
            return attend(
                q, k, v, queries=short, keys=short, in_order=True, method=method, **scoring
            )

        return str(jax.make_jaxpr(run)(*(x[:, :length] for x in (q, k, v))))

    assert "pallas_call" not in traced("auto")
    with pytest.raises(ConfigError, match=r"model.attention=flash: .* none for cpu"):
        traced("flash")
    monkeypatch.setitem(flash.KERNELS, "cpu", KERNELS["triton"])
    assert "pallas_call" in traced("auto")
    assert "pallas_call" not in traced("blocks")
    assert "pallas_call" not in traced("auto", length=200)
    with pytest.raises(ConfigError, match="128 tokens, not 200"):
        traced("flash", length=200)


@pytest.mark.parametrize(("capability", "fits"), [("7.5", False), ("8.0", True), ("gfx90a", False)])
def test_flash_of_gpus_is_for_those_that_can(capability, fits, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(triton, "current_device", lambda: device)
    whole = Placement(name="contiguous", num_devices=1, length=256)
    why = Triton().why_not(whole, Scoring(0.0, 0), queries=256, keys=256)
    assert (why == "") == fits and ("Ampere" in why) != fits


def test_flash_that_cannot_be_is_refused_before_anything_is_written(monkeypatch):
    keys = {"model": {"attention": "flash"}, "data": {"sequence_length": 256}}
    with pytest.raises(ConfigError, match="there is none for cpu"):
        build(parse(keys))
    monkeypatch.setitem(flash.KERNELS, "cpu", KERNELS["splash"])
    build(parse(keys))


GROUPS = dataclasses.replace(MODEL, num_kv_heads=2, remat="projections")
NO_KV_RULE = ShardingConfig(rules={"kv_heads": "none"})
LAYOUTS = {
    "mixed": ({"data": 2, "tensor": 2}, ShardingConfig()),
    # Each device has all key heads, but a share of the query heads.
    "few-key-heads": ({"fsdp": 2, "tensor": 4}, NO_KV_RULE),
    "pipeline": ({"pipeline": 2, "fsdp": 2, "tensor": 2}, ShardingConfig()),
}


def program(mesh, attention, *, remat="projections", **changes):
    model = dataclasses.replace(GROUPS, attention=attention, remat=remat)
    return program_of(mesh, model=model, length=128, global_batch_size=8, **changes)


@pytest.fixture(scope="module")
def by_blocks():
    """Batches, the first state, losses and the last parameters."""
    batches = [random_batch(seed=seed, size=8, length=128) for seed in range(2)]
    built = program({}, "blocks")
    first = jax.device_get(built.init(0))
    return batches, first, *run_steps(built, batches, state=put_state(built, first))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_trains_as_blocks_on_any_mesh(layout, by_blocks, monkeypatch):
    mesh, sharding = LAYOUTS[layout]
    batches, first, wanted, last = by_blocks
    monkeypatch.setitem(flash.KERNELS, "cpu", KERNELS["splash"])
    built = program(mesh, "flash", sharding=sharding)
    losses, state = run_steps(built, batches, state=put_state(built, first))
    np.testing.assert_allclose(losses, wanted, rtol=1e-6)
    assert largest_difference(state.params, last.params)[0] < PARAMS_TOLERANCE


@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("projections", 1), ("full", 2)])
def test_flash_runs_again_only_under_full_remat(remat, forwards, monkeypatch):
    monkeypatch.setitem(flash.KERNELS, "cpu", KERNELS["splash"])
    built = program({}, "flash", remat=remat)
    traced = built.train_step.trace(built.abstract_state, built.abstract_batch)
    names = [eqn.params["name"] for eqn in kernels_of(traced.jaxpr.jaxpr)]
    assert sum("_fwd_" in name for name in names) == forwards, names
    assert len(names) == forwards + 2, names


def kernels_of(jaxpr):
    """Every kernel call in a program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for value in eqn.params.values():
                for inner in value if isinstance(value, tuple) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        yield from kernels_of(inner)


def test_flash_tells_its_flops():
    scope = f"jit(step)/jvp(blocks)/attention/flash/{kernel_flops(2.0**33)}/pallas_call"
    assert told_flops(scope) == 2.0**33
    assert clean_op_name(scope)[0] == "forward/blocks/attention/flash"
