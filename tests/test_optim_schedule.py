"""Schedules against their formulas, computed here in plain Python."""

import math

import jax
import numpy as np
import pytest

from spmd_train.config import ConfigError, OptimizerConfig, ScheduleConfig
from spmd_train.optim import make_schedule

PEAK = 0.02


def rates(num_steps: int, until: int, **schedule) -> np.ndarray:
    config = OptimizerConfig(learning_rate=PEAK, schedule=ScheduleConfig(**schedule))
    function = make_schedule(config, num_steps=num_steps)
    return np.array([float(function(step)) for step in range(until)])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "wsd"])
def test_optim_schedule_warms_up_linearly_from_zero(name):
    got = rates(100, 11, name=name, warmup_steps=10, decay_steps=20 if name != "constant" else 0)
    np.testing.assert_allclose(got, [PEAK * n / 10 for n in range(11)], rtol=1e-6)


def test_optim_schedule_constant_stays():
    np.testing.assert_allclose(rates(10, 20, name="constant"), PEAK, rtol=1e-6)


def test_optim_schedule_cosine_follows_the_cosine_to_the_end_of_the_run():
    got = rates(100, 120, name="cosine", warmup_steps=20, end_factor=0.1)
    for step in range(20, 100):
        half_cosine = 0.5 * (1 + math.cos(math.pi * (step - 20) / 80))
        assert got[step] == pytest.approx(PEAK * (0.1 + 0.9 * half_cosine), rel=1e-5)
    np.testing.assert_allclose(got[100:], 0.1 * PEAK, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_optim_schedule_decay_steps_is_where_decay_ends(name):
    got = rates(100, 100, name=name, warmup_steps=10, decay_steps=50, end_factor=0.25)
    assert got[30] == pytest.approx(PEAK * 0.625, rel=1e-5)  # half way, by symmetry of both
    assert got[49] > 0.25 * PEAK * 1.0001
    np.testing.assert_allclose(got[50:], 0.25 * PEAK, rtol=1e-5)


def test_optim_schedule_linear_goes_down_by_equal_steps():
    got = rates(40, 41, name="linear", end_factor=0.0)
    np.testing.assert_allclose(got, np.linspace(PEAK, 0, 41), atol=1e-8)


def test_optim_schedule_wsd_is_flat_and_then_linear():
    got = rates(100, 110, name="wsd", warmup_steps=10, decay_steps=20, end_factor=0.5)
    np.testing.assert_allclose(got[10:81], PEAK, rtol=1e-6)
    np.testing.assert_allclose(got[80:101], np.linspace(PEAK, PEAK / 2, 21), rtol=1e-5)
    np.testing.assert_allclose(got[100:], PEAK / 2, rtol=1e-5)


def test_optim_schedule_of_a_run_cut_short_is_its_warmup():
    for name in ("constant", "cosine", "linear"):
        got = rates(3, 3, name=name, warmup_steps=100)
        np.testing.assert_allclose(got, [0, PEAK / 100, PEAK / 50], rtol=1e-5)


def test_optim_schedule_is_the_same_when_traced():
    config = OptimizerConfig(
        learning_rate=PEAK, schedule=ScheduleConfig(warmup_steps=5, decay_steps=30)
    )
    schedule = make_schedule(config, num_steps=100)
    traced = jax.jit(schedule)
    for step in (0, 3, 5, 17, 30, 99):
        assert float(traced(np.int32(step))) == pytest.approx(float(schedule(step)), rel=1e-6)


@pytest.mark.parametrize(
    "schedule",
    [
        {"name": "wsd", "decay_steps": 0},
        {"name": "wsd", "decay_steps": 95, "warmup_steps": 10},
        {"name": "cosine", "decay_steps": 10, "warmup_steps": 10},
        {"name": "linear", "decay_steps": 5, "warmup_steps": 10},
    ],
)
def test_optim_schedule_that_cannot_be_is_told(schedule):
    with pytest.raises(ConfigError, match=r"optimizer\.schedule\.decay_steps = \d+"):
        rates(100, 1, **schedule)
