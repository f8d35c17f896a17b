"""What is done for XLA's CPU compiler: it works, changes no number, and stays off elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np

from spmd_train.config import RopeConfig
from spmd_train.nn import cpu
from spmd_train.nn.embeddings import apply_rope, rope_angles


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
