"""bfloat16 parameters rounded at random: right on average, and the same on every mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MODEL, OPTIMIZER, by_path, program_of, put, random_batch, run_steps

from spmd_train.optim.rounding import apply_updates_stochastically, round_stochastically

BF16 = dataclasses.replace(MODEL, param_dtype="bfloat16")
ROUNDED = dataclasses.replace(OPTIMIZER, stochastic_rounding=True)


def test_precision_rounding_is_unbiased():
    x = jnp.array([1.0, 1 + 2**-9, 1 + 2**-8, -1 - 2**-10, 3e-5, -1e30, 0.0], jnp.float32)
    count = 20_000
    keys = jax.random.split(jax.random.key(0), count)
    rounded = jax.vmap(lambda key: round_stochastically(x, key=key))(keys)
    assert rounded.dtype == jnp.bfloat16
    values = np.asarray(rounded, np.float64)
    # Only the two neighbours, whose distance is at most 2**-7 of them.
    step = np.abs(np.asarray(x)) * 2**-7
    assert (np.abs(values - np.asarray(x)) <= step).all()
    assert all(len(np.unique(column)) <= 2 for column in values.T)
    # Five standard deviations of the mean of a coin of that step.
    assert (np.abs(values.mean(axis=0) - np.asarray(x)) <= 5 * step / 2 / count**0.5).all()


def test_precision_rounding_keeps_what_bfloat16_has():
    exact = jnp.arange(-8, 8, 0.25, jnp.float32)
    exact = jnp.concatenate([exact, jnp.array([jnp.inf, -jnp.inf, 2.0**-133])])
    for seed in range(20):
        rounded = round_stochastically(exact, key=jax.random.key(seed))
        np.testing.assert_array_equal(np.asarray(rounded, np.float32), exact)
    # Any NaN stays one: the sum of this one's bits and others' would be zero.
    nan = jax.lax.bitcast_convert_type(jnp.uint32(0x7FFFFFFF), jnp.float32)
    assert jnp.isnan(round_stochastically(nan, key=jax.random.key(0)))


def test_precision_rounding_keeps_small_updates():
    """A thousand updates that are each a hundredth of a step."""
    params = {"a": jnp.ones(64, jnp.bfloat16), "b": jnp.ones(64, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 2**-7 / 100), params)

    def one(params, key):
        return apply_updates_stochastically(params, updates, key=key), None

    params, _ = jax.lax.scan(one, params, jax.random.split(jax.random.key(1), 1000))
    a, b = (np.asarray(p, np.float64) for p in params.values())
    assert a.mean() == pytest.approx(1 + 10 * 2**-7, abs=2**-7)
    assert (a != b).any()


def test_precision_rounding_leaves_float32_to_float32():
    params = {"w": jnp.ones(3), "v": jnp.ones(3, jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, 1e-6), params)
    new = apply_updates_stochastically(params, updates, key=jax.random.key(0))
    np.testing.assert_array_equal(new["w"], params["w"] + updates["w"])
    assert new["v"].dtype == jnp.bfloat16


def after_two_steps(sizes, **changes):
    """Of a batch without weight: nothing but decay moves the parameters, exactly."""
    optimizer = dataclasses.replace(ROUNDED, name="sgd", b1=0.0, learning_rate=0.05)
    program = program_of(sizes, model=BF16, optimizer=optimizer, **changes)
    batch = random_batch("plain")
    batch["weights"][:] = 0
    state = program.init(0)
    for _ in range(2):
        state, _ = program.train_step(state, put(program, batch))
    return by_path(jax.device_get(state.params))


def test_precision_rounding_is_the_same_on_every_mesh():
    """Bitwise, again and again; another seed rounds otherwise."""
    one = after_two_steps({})
    for sizes in ({}, {"fsdp": 2, "tensor": 2}):
        same = after_two_steps(sizes)
        for path in one:
            np.testing.assert_array_equal(same[path], one[path], err_msg=path)
    other = after_two_steps({}, seed=4)
    differ = {path for path in one if (one[path] != other[path]).any()}
    assert differ == {path for path in one if path.endswith("/kernel")}


@pytest.mark.slow
def test_precision_rounding_learns_where_the_nearest_stands_still():
    """200 steps of 1e-4, on weights whose neighbours in bfloat16 are mostly further off."""
    batch = random_batch("plain", size=8)

    def learned(model, **optimizer):
        program = program_of(
            {},
            model=model,
            optimizer=dataclasses.replace(
                OPTIMIZER, learning_rate=1e-4, weight_decay=0.0, **optimizer
            ),
            global_batch_size=8,
        )
        losses, _ = run_steps(program, [batch] * 200)
        return losses[0] - losses[-1]

    wanted = learned(MODEL)
    nearest = learned(BF16)
    stochastic = learned(BF16, stochastic_rounding=True)
    assert nearest < 0.6 * wanted
    assert stochastic == pytest.approx(wanted, rel=0.15)
