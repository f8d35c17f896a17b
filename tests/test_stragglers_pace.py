"""The process that holds the others up is named."""

from __future__ import annotations

import json
import os
import re

import fault_helpers as faults
import pytest

from spmd_train import cluster
from spmd_train.observe import StepClock, Stragglers, read_jsonl
from spmd_train.observe.stragglers import Pace, slowest

# A host whose storage is slow: each batch takes 0.3 s to make.
SLOW = """
import time
from spmd_train.data import Dataset
batch = Dataset.batch
def slow(self, step, **options):
    time.sleep(0.3)
    return batch(self, step, **options)
Dataset.batch = slow
"""


def pace(*, step=1.0, data=0.0, device=0.9):
    return Pace(host="h", step=step, data=data, device=device, barrier=0.0)


@pytest.mark.parametrize(
    "paces, number, excess",
    [
        ([pace(), pace(data=0.5, device=0.2)], 1, 0.7),
        ([pace(device=0.1), pace(), pace(), pace()], 0, 0.8),
        ([pace(), pace(), pace(device=0.88)], 2, 0.02),
    ],
)
def test_stragglers_are_those_that_others_wait_for(paces, number, excess):
    assert slowest(paces) == (number, pytest.approx(excess))


def test_stragglers_of_one_process_are_not_looked_for():
    stragglers = Stragglers(StepClock(tokens_per_step=1), every=1)
    assert not any(stragglers.stepped(step) for step in range(1, 5))


def test_stragglers_wait_for_the_last_is_not_ones_own_time(monkeypatch):
    """Compared after each step: the fast host's wait at the barrier must not make it look slow."""
    seconds = [0.0]
    clock = StepClock(tokens_per_step=1, now=lambda: seconds[0])
    monkeypatch.setattr(cluster, "connected", lambda: True)

    def wait():
        seconds[0] += 1.0

    told = []

    def tell(text):
        mine = json.loads(text)
        told.append(mine)
        return [json.dumps(mine | {"step": 1.1}), text]

    monkeypatch.setattr(cluster, "meet_again", wait)
    monkeypatch.setattr(cluster, "tell_all", tell)
    stragglers = Stragglers(clock, every=1)
    for step in (1, 2, 3):
        seconds[0] += 0.1
        clock.step_done()
        found = stragglers.stepped(step)
    assert [one["step"] for one in told] == [pytest.approx(0.1)] * 2
    assert found["slowest_process"] == 0 and found["slowest_seconds"] == pytest.approx(1.0)


def test_stragglers_slow_host_is_named(tmp_path):
    """Two real processes; the second waits for its data."""
    words = faults.command(
        tmp_path / "run",
        train__num_steps=12,
        train__checkpoint_every=0,
        data__num_threads=1,
        data__prefetch=1,
        observe__straggler_every=4,
    )
    codes, logs = faults.run_together(words, folder=tmp_path, prelude={1: SLOW})
    assert codes == [0, 0], logs
    told = re.findall(r"step (\d+): process (\d) on (\S+) is slow: (\S+) s", logs[0])
    assert [(step, number) for step, number, *_ in told] == [("4", "1"), ("8", "1"), ("12", "1")]
    assert {host for _, _, host, _ in told} == {os.uname().nodename}
    assert "is slow" not in logs[1], "one process tells"
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    named = [line for line in lines if "slowest_process" in line]
    assert [line["step"] for line in named] == [4, 8, 12]
    for line in named:
        assert line["slowest_process"] == 1
        assert 0.1 < line["slowest_seconds"] < 1
