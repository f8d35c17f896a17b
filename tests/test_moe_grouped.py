"""Grouped matmuls: by TPU's kernels, interpreted, and by blocks of rows, against each expert's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DROPLESS, MODEL, program_of, random_batch, run_steps

from spmd_train.nn import dispatch, grouped
from spmd_train.nn.projection import project_by_experts
from spmd_train.plan.hlo_cost import program_cost

NUM_ROWS, D, F = 300, 32, 48


@pytest.fixture(params=["blocks", "kernel"])
def how(request, monkeypatch):
    if request.param == "kernel":
        for module in (grouped, dispatch):
            monkeypatch.setattr(module, "grouped_by_kernel", lambda: True)
    return request.param


@pytest.mark.parametrize(
    "sizes", [(300,), (0, 170, 0, 1, 100, 0), (3,) * 100, (1, 0, 299), (0, 0), (16, 32, 48, 64)]
)
def test_moe_grouped_is_each_experts_own_matmul(sizes, how):
    x, kernel, g = (
        jax.random.normal(jax.random.key(i), shape)
        for i, shape in enumerate([(NUM_ROWS, D), (len(sizes), D, F), (NUM_ROWS, F)])
    )
    total = sum(sizes)
    g = g.at[total:].set(0)

    @jax.jit
    def run(x, kernel, sizes):
        y, pull = jax.vjp(lambda x, k: project_by_experts(x, k, sizes), x, kernel)
        return y, *pull(g)

    y, dx, dkernel = run(x, kernel, jnp.array(sizes, jnp.int32))
    begin = 0
    for expert, size in enumerate(sizes):
        rows = slice(begin, begin + size)
        np.testing.assert_allclose(y[rows], x[rows] @ kernel[expert], atol=1e-4)
        np.testing.assert_allclose(dx[rows], g[rows] @ kernel[expert].T, atol=1e-4)
        np.testing.assert_allclose(dkernel[expert], x[rows].T @ g[rows], atol=1e-4)
        begin += size


def test_moe_grouped_is_not_all_rows_by_all_experts():
    """FLOPs of 8 experts' matmuls, forwards and backwards: at most a fifth above the rows' own."""
    x, kernel = jnp.zeros((4096, D)), jnp.zeros((8, D, F))
    sizes = jnp.full((8,), 512, jnp.int32)

    def loss(x, kernel):
        return project_by_experts(x, kernel, sizes).sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(x, kernel).compile()
    flops = sum(program_cost(compiled.as_text()).flops_by("dtype").values())
    assert 1 <= flops / (3 * 2 * 4096 * D * F) <= 1.2


@pytest.mark.parametrize(
    "mesh",
    [{"expert": 2, "tensor": 2}, {"pipeline": 2, "data": 2, "expert": 2}],
    ids=["flat", "pipeline"],
)
def test_moe_grouped_by_kernel_trains_as_by_blocks(monkeypatch, mesh):
    """On a mesh: where kernels are, JAX does not prove what varies over which devices."""

    def losses():
        program = program_of(mesh, model=MODEL, moe=DROPLESS)
        return run_steps(program, [random_batch("ragged")] * 2)[0]

    wanted = losses()
    for module in (grouped, dispatch):
        monkeypatch.setattr(module, "grouped_by_kernel", lambda: True)
    np.testing.assert_allclose(losses(), wanted, rtol=2e-6)
