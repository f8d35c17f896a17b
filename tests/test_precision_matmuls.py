"""Quantized projections: how far off they are, their gradients, what is multiplied in 8 bits."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import LENGTH, MODEL, TRAIN, program_of

from spmd_train.config import ConfigError
from spmd_train.nn.projection import project, project_by_experts
from spmd_train.nn.quantization import dots_of
from spmd_train.plan.hlo_cost import program_cost

# Rounding to a step of 1/127 of the largest of 64 normal numbers (2.4 on average) is an error of
# 2.4 / 127 / sqrt(12) = 0.0055 of each operand, of two of them 0.0077; E4M3 has 3 bits after the
# leading one: a relative error of up to 1/16, 0.026 in the mean square, two of them 0.037. E5M2
# has 2: 0.053, and with E4M3 0.059.
OUTPUT_ERROR = {"int8": 0.0077, "fp8": 0.037}
GRADIENT_ERROR = {"int8": 0.0077, "fp8": 0.059}


def normal(seed, shape, dtype):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def relative_error(got, wanted):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", OUTPUT_ERROR)
def test_precision_projection_errs_as_its_format_must(name, dtype):
    x, kernel, g = (
        normal(0, (8, 64, 64), dtype),
        normal(1, (64, 4, 16), dtype),
        normal(2, (8, 64, 4, 16), dtype),
    )

    def run(x, kernel, quantization):
        y, pull = jax.vjp(lambda x, k: project(x, k, quantization=quantization), x, kernel)
        return y, *pull(g)

    y, dx, dkernel = run(x, kernel, "none")
    got = jax.jit(run, static_argnums=2)(x, kernel, name)
    assert [a.dtype for a in got] == [dtype] * 3
    assert relative_error(got[0], y) == pytest.approx(OUTPUT_ERROR[name], rel=0.25)
    assert relative_error(got[1], dx) == pytest.approx(GRADIENT_ERROR[name], rel=0.25)
    assert relative_error(got[2], dkernel) < 1e-5


@pytest.mark.parametrize("sizes", [None, (3, 0, 11, 5)], ids=["capacity", "dropless"])
@pytest.mark.parametrize("name", OUTPUT_ERROR)
def test_precision_experts_err_as_their_format_must(name, sizes):
    shape = (4, 16) if sizes is None else (24,)  # 5 of its rows are no one's.
    x, kernel, g = (
        normal(0, (*shape, 64), jnp.bfloat16),
        normal(1, (4, 64, 48), jnp.bfloat16),
        normal(2, (*shape, 48), jnp.bfloat16),
    )
    g = g if sizes is None else g.at[sum(sizes) :].set(0)
    num_rows = None if sizes is None else sum(sizes)
    sizes = None if sizes is None else jnp.array(sizes, jnp.int32)

    def run(x, kernel, quantization):
        def multiply(x, kernel):
            return project_by_experts(x, kernel, sizes, quantization=quantization)

        y, pull = jax.vjp(multiply, x, kernel)
        return y[:num_rows], *(a[:num_rows] for a in pull(g))

    y, dx, dkernel = run(x, kernel, "none")
    got = jax.jit(run, static_argnums=2)(x, kernel, name)
    assert [a.dtype for a in got] == [jnp.bfloat16] * 3
    assert relative_error(got[0], y) == pytest.approx(OUTPUT_ERROR[name], rel=0.25)
    assert relative_error(got[1], dx) == pytest.approx(GRADIENT_ERROR[name], rel=0.25)
    assert relative_error(got[2], dkernel) < 1e-5


@pytest.mark.parametrize("name", OUTPUT_ERROR)
def test_precision_of_a_token_is_its_own(name):
    """Whatever else is in its batch: so no split of a batch changes what is learnt."""
    x, kernel = normal(0, (2, 3, 4, 8), jnp.float32), normal(1, (4, 8, 5), jnp.float32)
    loud = x.at[1].mul(1000)
    both, one = (
        project(part, kernel, num_contracted=2, quantization=name) for part in (loud, loud[:1])
    )
    np.testing.assert_array_equal(both[:1], one)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", OUTPUT_ERROR)
def test_precision_keeps_bad_numbers_bad(name, bad):
    x = normal(0, (3, 8), jnp.float32).at[1, 2].set(bad)
    y = np.asarray(project(x, normal(1, (8, 4), jnp.float32), quantization=name))
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()


def projection_flops():
    """Of one forward pass of all projections of the layers."""
    c = MODEL
    kernels = 4 * c.embed_dim * c.num_heads * c.resolved_head_dim + 3 * c.embed_dim * c.mlp_dim
    return 2 * TRAIN.global_batch_size * LENGTH * c.num_layers * kernels


@pytest.mark.parametrize(("name", "found"), [("int8", {"i8"}), ("fp8", {"f8E4M3FN", "f8E5M2"})])
def test_precision_step_multiplies_in_eight_bits(name, found):
    """In the program itself: operands of outputs, and of gradients of inputs."""
    program = program_of({}, model=dataclasses.replace(MODEL, quantization=name))
    dots = [
        line.rpartition(" : ")[2]
        for line in program.lower_train_step().as_text().splitlines()
        if "stablehlo.dot_general" in line
    ]
    types = [
        [t.split(">")[0].split("x")[-1] for t in dot.split("->")[0].split("tensor<")[1:]]
        for dot in dots
    ]
    eight = [pair for pair in types if set(pair) & found]
    # 7 projections of a layer in a scan: forwards, and backwards.
    assert len(eight) == 14
    assert {t for pair in eight for t in pair} == found


def test_precision_int8_is_what_xla_executes():
    """And what the planner counts: two of a projection's three matmuls."""
    program = program_of({}, model=dataclasses.replace(MODEL, quantization="int8"))
    text = program.lower_train_step().compile().as_text()
    by_dtype = program_cost(text).flops_by("dtype")
    assert by_dtype["s8"] == 2 * projection_flops()
    assert by_dtype["f32"] > projection_flops()


def test_precision_without_its_library_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    dots_of.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"model.quantization = 'int8' .*\[quantization\]"):
            program_of({}, model=dataclasses.replace(MODEL, quantization="int8"))
        program_of({})
    finally:
        dots_of.cache_clear()


@pytest.mark.parametrize("name", OUTPUT_ERROR)
def test_precision_of_next_to_nothing_is_next_to_nothing(name):
    """A row whose scale float32 could not hold."""
    x = jnp.full((2, 16), 1e-36, jnp.float32)
    y = project(x, jnp.ones((16, 8)), quantization=name)
    np.testing.assert_allclose(y, 0, atol=1e-30)
