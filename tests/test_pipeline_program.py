"""What the compiler makes of a pipeline: branches, sends, memory; and the errors before it."""

from __future__ import annotations

import itertools
import logging
import re

import pytest
from helpers import program_of
from pipeline_helpers import program

from spmd_train.config import ConfigError
from spmd_train.inspect.collectives import count_collectives
from spmd_train.inspect.memory import memory_report


def test_pipeline_program_branches_and_sends():
    built = program({"pipeline": 2, "fsdp": 2, "tensor": 2}, pipeline={"num_microbatches": 4})
    assert built.pipeline is not None
    text = built.lower_train_step().compile().as_text()
    assert text is not None
    # F and B, in each the first and the last stage's own part.
    assert text.count(" conditional(") >= 5
    ticks = built.pipeline.schedule.num_ticks
    found = count_collectives(text, axis_sizes=dict(built.mesh.shape))
    sends = [c for c in found if c.op == "collective-permute"]
    assert [(c.axes, c.count, c.conditional) for c in sends] == [(("pipeline",), ticks, False)] * 2
    # Weights are gathered and gradients reduced once, outside of the ticks, as shards of tensor.
    gathers = [c for c in found if c.op == "all-gather"]
    assert gathers
    assert {(c.axes, c.count) for c in gathers} == {(("fsdp",), 1)}
    scatters = [c for c in found if c.op == "reduce-scatter"]
    assert len(scatters) == len(gathers)
    for c in found:
        if c.conditional:
            assert c.op == "all-reduce"
            assert c.axes == ("tensor",), c


def test_pipeline_program_of_one_stage_has_no_trace_of_it():
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    texts = [
        program(mesh, pipeline=pipeline, accumulation=2).lower_train_step().as_text()
        for pipeline in (None, {"schedule": "zero_bubble", "num_microbatches": 4})
    ]
    assert texts[0] == texts[1]
    counted = {
        op: len(re.findall(rf"stablehlo\.{op}\b", texts[0]))
        for op in ("case", "collective_permute")
    }
    assert counted == {"case": 0, "collective_permute": 0}
    # The layer scan forwards and backwards, and the one over microbatches.
    assert len(re.findall(r"stablehlo\.while", texts[0])) == 3


def test_pipeline_program_memory_of_1f1b_does_not_grow_with_microbatches():
    _memory("1f1b", (8, 32))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero_bubble"])
def test_pipeline_program_memory_of_every_schedule(schedule):
    _memory(schedule, (8, 16, 32) if schedule == "interleaved" else (4, 8, 16, 32))


def _memory(schedule: str, counts: tuple[int, ...]) -> None:
    """Microbatches of one size: only gpipe keeps more of them the more there are."""
    layers = 8 if schedule == "interleaved" else 4
    activation = 2 * 256 * 32 * 4
    temporary = {}
    for m in counts:
        built = program(
            {"pipeline": 4},
            pipeline={"schedule": schedule, "num_microbatches": m},
            batch_size=2 * m,
            length=256,
            num_layers=layers,
        )
        report = memory_report(built.lower_train_step().compile())
        # The batch itself, which every stage is given.
        temporary[m] = report["temp_bytes"] - 5 * 4 * 2 * m * 256
    for few, many in itertools.pairwise(counts):
        grown = temporary[many] - temporary[few]
        if schedule == "gpipe":
            assert grown >= 0.9 * (many - few) * activation
        elif few >= 8:
            assert grown <= 0.1 * activation


def test_pipeline_errors_name_both_numbers():
    with pytest.raises(ConfigError, match=r"2 layers do not fill .* 4 x 1 = 4 .* at most 2"):
        program({"pipeline": 4}, num_layers=2)
    with pytest.raises(ConfigError, match=r"2 x 4 = 8 stages; set pipeline.virtual_stages .* 2"):
        program({"pipeline": 2}, pipeline={"schedule": "interleaved", "virtual_stages": 4})
    with pytest.raises(ConfigError, match=r"num_microbatches: 6 does not divide the 16 .* is 4"):
        program({"pipeline": 2}, pipeline={"num_microbatches": 6})
    with pytest.raises(ConfigError, match="no even parts in order"):
        program({"pipeline": 2}, pipeline={"schedule": "interleaved"}, rules={"layers": "pipeline"})


def test_pipeline_refuses_layers_that_are_no_runs_of_them():
    rules = {"layers": "fsdp+pipeline", "embed": "none"}
    match = r"sharding.rules.layers, or the override of blocks/.*: .* over fsdp\+pipeline.* first"
    with pytest.raises(ConfigError, match=match):
        program({"pipeline": 2, "fsdp": 2}, rules=rules)
    rules = {"layers": "data"}
    with pytest.raises(ConfigError, match=r"rules.layers.* over data, .* set it to none"):
        program({"pipeline": 2, "data": 2}, rules=rules)


def test_pipeline_cures_are_those_that_help():
    rules = {"layers": "pipeline+tensor", "mlp": "none", "heads": "none", "kv_heads": "none"}
    with pytest.raises(ConfigError, match="put pipeline last on that dim"):
        program({"pipeline": 2, "tensor": 2}, rules=rules)
    flops = {"balance": "flops"}
    with pytest.raises(ConfigError, match=r"With pipeline.balance = layers it need not"):
        program({"pipeline": 2, "fsdp": 4}, pipeline=flops, embed_dim=36, vocab_size=4096)


def test_pipeline_accumulates_as_a_device_can_take():
    built = program_of({"pipeline": 2}, global_batch_size=16, max_device_batch=2)
    assert built.pipeline.num_parts == 8


def test_pipeline_refuses_to_gather_a_part_of_a_dim():
    rules = {"mlp": "none", "heads": "none", "kv_heads": "none", "vocab": "none"}
    rules["embed"] = "fsdp+tensor"
    with pytest.raises(ConfigError, match=r"pipeline.gather: .* of which the pipeline gathers"):
        program({"pipeline": 2, "fsdp": 2, "tensor": 2}, rules=rules)


def test_pipeline_of_uneven_stages_refuses_an_embed_dim_that_does_not_divide():
    match = r"7 layers are no even .* = 3 stages .*, 32, .* 3 devices.* 6 or 9 layers .* 30 and 33"
    with pytest.raises(ConfigError, match=match):
        program({"pipeline": 3}, num_layers=7)


def test_pipeline_warns_of_too_few_microbatches(caplog):
    with caplog.at_level(logging.WARNING):
        program({"pipeline": 4}, pipeline={"num_microbatches": 2})
    assert "2 microbatches do not fill 4 stages: a device waits 60%" in caplog.text


def test_pipeline_chooses_microbatches_that_divide():
    assert program({"pipeline": 2}).pipeline.schedule.num_microbatches == 8
    built = program({"pipeline": 2, "data": 2}, accumulation=2)
    assert built.pipeline.schedule.num_microbatches == 4


def test_pipeline_devices_have_no_tokens_of_their_own():
    with pytest.raises(ConfigError, match=r"rules.sequence: pipeline has pipeline.* leave it out"):
        program({"pipeline": 2}, rules={"sequence": "pipeline"})
