"""What is done for XLA's CPU compiler: it works, changes no number, and stays off elsewhere."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_batch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train import xla_flags
from spmd_train.config import MeshConfig, RopeConfig, ShardingConfig
from spmd_train.nn import cpu
from spmd_train.nn.activations import swiglu
from spmd_train.nn.attention import attend
from spmd_train.nn.embeddings import apply_rope, rope_angles
from spmd_train.nn.projection import project
from spmd_train.parallel.blockwise import Tokens, visible
from spmd_train.parallel.mesh import make_mesh
from spmd_train.parallel.rules import Layout, make_rules, use_layout


def rotate_both(q_BTHK, k_BTHK, positions_BT):
    angles = rope_angles(positions_BT, RopeConfig(), head_dim=q_BTHK.shape[-1])
    # Not of one shape, or XLA would rotate both in one fusion.
    return apply_rope(q_BTHK, angles), apply_rope(k_BTHK, angles)


def num_cosines(monkeypatch, platform):
    monkeypatch.setattr(cpu, "current_platform", lambda: platform)
    shapes = [jax.ShapeDtypeStruct((2, 64, heads, 16), jnp.float32) for heads in (4, 2)]
    positions = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    # A function of its own for each, or the second would be the first's trace.
    compiled = jax.jit(lambda *args: rotate_both(*args)).lower(*shapes, positions).compile()
    return compiled.as_text().count(" cosine(")


def test_nn_cpu_angles_are_computed_once(monkeypatch):
    assert num_cosines(monkeypatch, "cpu") == 1
    assert num_cosines(monkeypatch, "tpu") > 1


def test_nn_cpu_computed_once_is_exact_and_differentiable():
    x = jax.random.normal(jax.random.key(0), (2, 5, 1, 32)) * 1e3
    np.testing.assert_array_equal(jax.jit(cpu.computed_once)(x), x)
    gradient = jax.grad(lambda x: jnp.sum(cpu.computed_once(x) ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)


def test_nn_cpu_kernels_of_heads_are_not_transposed():
    """`dx = g W'` over heads and their width: of two dims, no copy of the kernel is made."""
    x, kernel = jnp.ones((2, 64, 32)), jnp.ones((32, 4, 16))
    pull = jax.jit(lambda x, kernel, g: jax.vjp(project, x, kernel)[1](g)[0])
    told = pull.lower(x, kernel, jnp.ones((2, 64, 4, 16))).compile().as_text()
    assert " dot(" in told
    assert not re.search(r" (copy|transpose)\(", told)


def test_swiglu_keeps_two_arrays_and_has_the_same_gradients():
    gate, up, g = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 4
    value, pull = jax.vjp(swiglu, gate, up)
    expected, pull_expected = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, gate, up)
    np.testing.assert_array_equal(value, expected)
    for ours, theirs in zip(pull(g), pull_expected(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    kept, kept_by_default = (
        sum(leaf.shape == gate.shape for leaf in jax.tree.leaves(p)) for p in (pull, pull_expected)
    )
    assert kept == 2 < kept_by_default


@pytest.mark.parametrize(
    "tokens, mesh, widths",
    [
        (512, {}, {"512": 0, "528": 3}),
        (512, {"data": 2}, {"512": 0, "528": 3}),
        (512, {"tensor": 2}, {"256": 2, "512": 1, "528": 0}),  # A kernel in parts stays as it is.
        (64, {}, {"512": 2, "528": 1}),  # Few rows are not worth a copy of the kernel.
    ],
)
def test_nn_cpu_rows_of_a_result_are_kept_apart(tokens, mesh, widths):
    """Output, gradient of the input and of the kernel: as many columns as said; same values."""
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(2, tokens, 512), (512, 512), (2, tokens, 512)])
    )

    def products(x, kernel, g):
        y, pull = jax.vjp(project, x, kernel)
        return y, *pull(g)

    config = MeshConfig(**{"data": 1, **mesh})
    devices = make_mesh(config, devices=jax.devices()[: math.prod(mesh.values())])
    specs = {"kernel": P(None, "tensor") if "tensor" in mesh else P()}
    layout = Layout(devices, make_rules(ShardingConfig()), specs)
    by_batch = NamedSharding(devices, P("data"))
    shardings = (by_batch, NamedSharding(devices, specs["kernel"]), by_batch)
    with use_layout(layout):
        step = jax.jit(products, in_shardings=shardings).lower(x, kernel, g).compile()
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", step.as_text())
    columns = [width for _, width in found]
    assert {width: columns.count(width) for width in widths} == widths, found
    # The input of a kernel's gradient is read by columns.
    assert (("528", "528") in found) == ("tensor" not in mesh and "528" in widths), found
    expected = x @ kernel, g @ kernel.T, jnp.einsum("btd,btf->df", x, g)
    for ours, theirs in zip(step(x, kernel, g), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)


def test_nn_cpu_bfloat16_is_multiplied_as_it_is(monkeypatch):
    """Of output and input's gradient nothing is made float32 before; of the kernel's it is."""
    monkeypatch.setattr(xla_flags, "_multiplies_bfloat16", lambda: True)
    options = xla_flags.program_options("cpu", compute_dtype="bfloat16")
    assert options and not xla_flags.program_options("cpu", compute_dtype="float32")
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape).astype(jnp.bfloat16)
        for i, shape in enumerate([(2, 64, 32), (32, 48), (2, 64, 48)])
    )

    def products(x, kernel, g):
        y, pull = jax.vjp(project, x, kernel)
        return y, *pull(g)

    step = jax.jit(products, compiler_options=options).lower(x, kernel, g).compile()
    text = step.as_text()
    multiplied = re.findall(r"\(\S+ bf16\[[\d,]+\], \S+ bf16\[[\d,]+\]\) -> f32\[", text)
    assert len(multiplied) == 2 < text.count(" dot(") == 3, text
    x, kernel, g = (np.asarray(a, np.float32) for a in (x, kernel, g))
    expected = x @ kernel, g @ kernel.T, np.einsum("btd,btf->df", x, g)
    for ours, theirs in zip(step(*map(jnp.bfloat16, (x, kernel, g))), expected, strict=True):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=8e-3, atol=1e-3)


@pytest.mark.parametrize("dtype, atol", [("float32", 2e-5), ("bfloat16", 0.06)])
def test_nn_cpu_attention_is_jaxs_own_in_value_and_gradient(dtype, atol):
    """Grouped, of packed sequences, of a length whose rows of scores are put apart."""
    keys, length = jax.random.split(jax.random.key(0), 4), 512
    q, out_gradient = (jax.random.normal(key, (2, length, 6, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, length, 2, 8)) for key in keys[2:])
    batch = random_batch("packed", size=2, length=length)
    tokens = Tokens(jnp.asarray(batch["segment_ids"]), jnp.asarray(batch["positions"]))
    assert batch["segment_ids"].max() > 1
    q, k, v, out_gradient = (x.astype(dtype) for x in (q, k, v, out_gradient))

    def ours(q, k, v):
        return attend(q, k, v, queries=tokens, keys=tokens, in_order=True)

    def jaxs(q, k, v):
        mask = visible(tokens, tokens, window=0)[:, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask)

    def run(f, *qkv_and_gradient):
        *qkv, out_gradient = qkv_and_gradient
        out, pull = jax.vjp(f, *qkv)
        return out, *pull(out_gradient)

    given = q, k, v, out_gradient
    exact = run(jaxs, *(x.astype(jnp.float32) for x in given))
    compiled = jax.jit(run, static_argnums=0)
    for got, wanted in zip(compiled(ours, *given), exact, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(np.float32), wanted, atol=atol)
    text = compiled.lower(ours, *given).as_text()
    width = 528 if dtype == "float32" else 512
    assert f"-> tensor<2x2x8x{width}xf32>" in text  # The gradient of keys, which come last.
