"""The formulas of the search against the compiler, for every config that ships."""

import dataclasses
import math
import pathlib

import jax
import pytest

from spmd_train import experiment
from spmd_train.config import MeshConfig, load_config, parse
from spmd_train.plan.compiled import compile_step
from spmd_train.plan.hlo_cost import program_cost
from spmd_train.plan.sizes import state_bytes
from spmd_train.plan.trace_cost import trace_cost

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


def check(config, mesh):
    """FLOPs within 5%, bytes exactly."""
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh))
    program = experiment.build(config).program
    step = compile_step(program)
    cost = program_cost(step.hlo_text)
    alone = dataclasses.replace(config, mesh=MeshConfig(data=1))
    traced = trace_cost(
        experiment.build(alone, devices=jax.devices()[:1]).program,
        embed_dim=config.model.embed_dim,
        num_layers=config.model.num_layers,
    )
    assert traced.flops / 8 == pytest.approx(cost.flops, rel=0.05)
    state = state_bytes(program.plans)
    batch = sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for name, x in program.abstract_batch.items()
        if name != "row"  # For dropout alone: the compiler drops it.
    )
    assert state.parameters + state.optimizer + batch == step.memory["argument_bytes"]
    return traced.flops / 8 / cost.flops


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_plan_configs_full(path):
    import time

    t = time.time()
    config = parse(load_config(str(path)))
    print(path.stem, check(config, {"data": 1, "fsdp": 8}), time.time() - t)
