"""The program does not grow with depth, and hardly with the number of devices."""

import dataclasses

import jax
import pytest

from spmd_train import experiment
from spmd_train.config import parse
from spmd_train.plan.compiled import compile_step
from spmd_train.plan.hlo_cost import program_cost

SMALL = {
    "model": {"embed_dim": 64, "num_heads": 8, "mlp_dim": 128},
    "data": {"sequence_length": 64},
    "train": {"global_batch_size": 16},
    "optimizer": {"name": "adamw"},
}


def lowered_lines(*, num_layers, **mesh):
    config = parse(SMALL | {"mesh": mesh})
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, num_layers=num_layers)
    )
    program = experiment.build(config, devices=jax.devices()).program
    return program, len(program.lower_train_step().as_text().splitlines())


@pytest.mark.parametrize("mesh", [{"data": 1, "fsdp": 8}, {"pipeline": 8, "data": 1}], ids=str)
def test_plan_growth_with_depth_is_none_before_the_compiler(mesh):
    shallow, deep = (lowered_lines(num_layers=n, **mesh)[1] for n in (8, 80))
    assert deep == shallow


@pytest.mark.slow
def test_plan_growth_with_depth_is_none_after_the_compiler():
    programs = [lowered_lines(num_layers=n, data=1, fsdp=8)[0] for n in (8, 80)]
    steps = [compile_step(program) for program in programs]
    costs = [program_cost(step.hlo_text) for step in steps]
    # The compiler fuses a little differently.
    assert costs[1].num_instructions <= 1.02 * costs[0].num_instructions
    in_layers = [
        sum(c.count or 0 for c in step.collectives if "blocks" in c.scope) for step in steps
    ]
    assert in_layers[0] > 0 and in_layers[1] == 10 * in_layers[0]
