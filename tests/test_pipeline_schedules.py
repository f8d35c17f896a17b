"""The tables against theory, and the checker against broken tables."""

from __future__ import annotations

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest

from spmd_train.parallel.schedule_table import KEPT, RECOMPUTED, Cell, ScheduleError, Unit
from spmd_train.parallel.schedules import columns, forward_only, make_schedule

SIZES = [(2, 4), (2, 7), (3, 9), (4, 8), (4, 16), (8, 32)]


def schedule(name, p, m, v=1):
    return make_schedule(name, num_stages=p, num_microbatches=m, num_chunks=v)


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_pipeline_schedule_is_valid_for_any_sizes(name):
    chunks = (1, 2, 3) if name == "interleaved" else (1,)
    for p, m, v in itertools.product(range(1, 7), range(1, 14), chunks):
        table = schedule(name, p, m, v)
        table.check()
        assert table.executed()["forward"] == m * (p * v - 1)
        assert table.executed()["backward"] == m * p * v
        assert table.executed()["weights"] == (m * p if name == "zero_bubble" else 0)


@pytest.mark.parametrize("costs", [RECOMPUTED, KEPT])
@pytest.mark.parametrize("p, m", SIZES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_pipeline_schedule_bubble_is_theory(name, p, m, costs):
    table = schedule(name, p, m)
    assert table.cost(costs) == (m + p - 1) * sum(costs)
    assert table.bubble(costs) == pytest.approx(float(Fraction(p - 1, m + p - 1)), abs=1e-12)


@pytest.mark.parametrize("p, m, v", [(2, 4, 2), (4, 8, 2), (4, 16, 3), (8, 16, 4)])
def test_pipeline_schedule_interleaved_bubble_is_theory(p, m, v):
    table = schedule("interleaved", p, m, v)
    assert table.cost() == pytest.approx((m * v + p - 1) * sum(RECOMPUTED) / v)
    assert table.bubble() == pytest.approx((p - 1) / (v * m + p - 1))
    assert table.bubble() < schedule("1f1b", p, m).bubble()


@pytest.mark.parametrize("costs", [RECOMPUTED, KEPT])
@pytest.mark.parametrize("p, m", [(2, 4), (3, 9), (4, 8), (4, 16), (8, 32)])
def test_pipeline_schedule_zero_bubble_is_zb_h1(p, m, costs):
    """ZB-H1's time, M(f+b+w) + (P-1)(f+b-w): table 2 of arXiv:2401.10241."""
    f, b, w = costs
    table, plain = schedule("zero_bubble", p, m), schedule("1f1b", p, m)
    if costs is RECOMPUTED:
        assert table.cost(costs) == m * (f + b + w) + (p - 1) * (f + b - w)
    assert table.cost(costs) <= m * (f + b + w) + (p - 1) * (f + b)
    assert table.bubble(costs) < plain.bubble(costs)
    assert table.num_input_slots == plain.num_input_slots


def test_pipeline_schedule_memory_classes():
    for p in (2, 4, 8):
        for m in (4 * p, 8 * p):
            assert schedule("gpipe", p, m).num_input_slots == m
            assert schedule("1f1b", p, m).num_input_slots == 2 * p - 1
            table = schedule("zero_bubble", p, m)
            assert table.num_input_slots == table.num_deferred_slots == 2 * p - 1
    few, many = (schedule("interleaved", 4, m, 2).num_input_slots for m in (16, 64))
    assert few == many


def test_pipeline_schedule_forward_only():
    assert forward_only(num_stages=4, num_microbatches=8).num_ticks == 11
    table = forward_only(num_stages=4, num_microbatches=8, num_chunks=2)
    assert table.num_ticks == 8 * 2 + 3
    assert table.executed()["backward"] == 0


def test_pipeline_schedule_columns_hold_the_table():
    table = schedule("zero_bubble", 4, 8)
    read = columns(table)
    for tick, device, cell in table.cells():
        at = tick, device
        assert bool(read.forward[at]) == (cell.forward is not None)
        if cell.backward is not None:
            unit = Unit(read.backward_microbatch[at], read.backward_chunk[at])
            assert unit == cell.backward
            assert read.backward_slot[at] == table.input_slots[device, cell.backward]
        first, number = read.first_weights[at], read.num_weights[at]
        assert [u.microbatch for u in cell.weights] == list(range(first, first + number))
    assert all(column.dtype == np.int32 for column in read)


def _changed(table, edit):
    grid = [list(row) for row in table.grid]
    edit(grid)
    return dataclasses.replace(table, grid=tuple(map(tuple, grid)))


@pytest.mark.parametrize(
    "edit, told",
    [
        (lambda g: g[0].__setitem__(0, Cell()), "missing or extra"),
        (lambda g: g.insert(1, [Cell(), Cell()]), "not right after"),
        (lambda g: g[0].__setitem__(0, g[0][0]._replace(backward=Unit(0, 0))), "twice"),
        (lambda g: g[2].__setitem__(0, g[2][0]._replace(backward=None)), "missing or extra"),
        (lambda g: g.reverse(), "not right after"),
    ],
)
def test_pipeline_schedule_check_refuses_broken_tables(edit, told):
    with pytest.raises(ScheduleError, match=told):
        _changed(schedule("1f1b", 2, 4), edit).check()


def test_pipeline_schedule_check_sees_overwritten_inputs():
    table = schedule("1f1b", 4, 8)
    table.input_slots.update({place: 0 for place in table.input_slots})
    with pytest.raises(ScheduleError, match="overwritten"):
        table.check()
