"""What `plan` tries where a config does not fit."""

import itertools
import types
from typing import Any

from spmd_train.config import parse
from spmd_train.plan.advice import _changes


def test_plan_advice_tries_no_change_twice():
    """Copies of a state that fills most of the memory: sharded first, then with less kept."""
    state = types.SimpleNamespace(parameters=60, optimizer=20)
    plan: Any = types.SimpleNamespace(mesh={"data": 8}, usable_bytes=100, state=state)
    config = parse({"train": {"global_batch_size": 16}, "model": {"remat": "none"}})
    changes = list(itertools.islice(_changes(config, plan), 3))
    shard = {"mesh.data": 1, "mesh.replica": 1, "mesh.fsdp": 8}
    remat = {"model.remat": "full"}
    assert changes == [shard, shard | remat, {"train.grad_accumulation": 2} | remat]
