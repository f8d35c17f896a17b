"""`spmd-train inspect schedule`."""

from __future__ import annotations

import functools
import itertools
import json
import xml.etree.ElementTree

import numpy as np
import pytest

from spmd_train.cli.main import main
from spmd_train.parallel.stages import loads, make_stages

CONFIG = ["inspect", "schedule", "--config=configs/lm_tiny.py"]
MESH = [
    "--config.mesh.pipeline=4",
    "--config.mesh.fsdp=2",
    "--config.mesh.data=1",
    "--config.train.global_batch_size=16",
]


def test_pipeline_inspect_prints_the_grid(capsys, tmp_path):
    svg = tmp_path / "schedule.svg"
    keys = ["--config.pipeline.schedule=1f1b", "--config.pipeline.num_microbatches=8"]
    assert main([*CONFIG, *MESH, *keys, f"--svg={svg}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["3", "F3", "F2", "F1", "F0", "B0"] for line in lines)
    assert any(line.startswith("14 ticks; bubble 27.27%") for line in lines)
    boxes = xml.etree.ElementTree.parse(svg).getroot().findall("{*}rect")
    assert len(boxes) > 2 * 8 * 4


def test_pipeline_inspect_answers_in_json(capsys):
    keys = ["--config.pipeline.schedule=zero_bubble", "--config.pipeline.num_microbatches=8"]
    assert main([*CONFIG, *MESH, *keys, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ticks"] == len(told["grid"]) == 14
    assert told["executed"] == {"forward": 24, "backward": 32, "weights": 32}
    step, microbatch = told["gather"]["step"], told["gather"]["microbatch"]
    assert step["wire_bytes"] < microbatch["wire_bytes"]
    assert step["held_bytes"] > microbatch["held_bytes"]
    assert told["per_device"]["deferred_bytes"] > told["per_device"]["input_bytes"]


def test_pipeline_inspect_balances_experts_and_head(capsys):
    keys = ["--config.moe.num_experts=4", "--config.moe.balance=bias", "--json"]
    model = ["--config.model.num_layers=8", "--config.model.vocab_size=8192"]
    told = []
    for balance in ("layers", "flops"):
        name = f"--config.pipeline.balance={balance}"
        assert main([*CONFIG, *MESH, *keys, *model, name]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0]["layers"] == [2, 2, 2, 2]
    assert sum(told[1]["layers"]) == 8
    assert max(told[1]["loads"]) < max(told[0]["loads"])


def test_pipeline_inspect_needs_stages(capsys):
    assert main([*CONFIG]) == 2
    assert "1 stage needs no schedule" in capsys.readouterr().err


@pytest.mark.parametrize(
    "num_layers, devices, head, even, balanced",
    [
        # The head weighs as much as 2.4 layers; none; 6, but every stage has a layer.
        (8, 4, 2.4, 13.2, (3, 2, 2, 1)),
        (5, 2, 0.0, 12.0, (2, 3)),
        (4, 2, 6.0, 24.0, (3, 1)),
        (8, 4, 0.5, 8.0, (2, 2, 2, 2)),
    ],
)
def test_pipeline_stages_balance_work_with_the_head(num_layers, devices, head, even, balanced):
    divide = functools.partial(make_stages, num_layers, num_devices=devices, num_chunks=1)
    assert max(loads(divide().sizes, head_layers=head)) == pytest.approx(even)
    assert divide(balance="flops", head_layers=head).sizes == balanced
    # None of all divisions is better.
    cuts = itertools.combinations(range(1, num_layers), devices - 1)
    all_sizes = (np.diff([0, *cut, num_layers]).tolist() for cut in cuts)
    best = min(max(loads(sizes, head_layers=head)) for sizes in all_sizes)
    assert max(loads(balanced, head_layers=head)) == best <= even


@pytest.mark.parametrize(
    "num_layers, devices, chunks, sizes",
    [(8, 4, 1, [2, 2, 2, 2]), (7, 4, 1, [2, 2, 2, 1]), (5, 2, 2, [2, 1, 1, 1])],
)
def test_pipeline_stages_hold_every_layer_once(num_layers, devices, chunks, sizes):
    stages = make_stages(num_layers, num_devices=devices, num_chunks=chunks)
    assert list(stages.sizes) == sizes
    held = stages.layers[stages.layers >= 0]
    assert sorted(held.tolist()) == list(range(num_layers))
