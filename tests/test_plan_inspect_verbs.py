"""`inspect collectives` and `inspect memory` on the devices at hand."""

import json
import pathlib

import pytest

from spmd_train.cli.main import main

TINY = f"--config={pathlib.Path(__file__).parent.parent / 'configs' / 'lm_tiny.py'}"
SMALL = [
    "--simulate_devices=8",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=64",
    "--config.optimizer.name=adamw",
]
# 4 heads of 16, mlp 352, vocab 256: a layer's kernels, both norms, both tables, the final norm.
LAYER = 4 * 64 * 64 + 3 * 64 * 352
PARAMS = 2 * (LAYER + 2 * 64) + 2 * 256 * 64 + 64


@pytest.fixture
def answer(capsys):
    def answer(*argv):
        assert main([*argv, TINY, *SMALL, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return answer


def test_plan_inspect_collectives_tells_what_the_layout_sends(answer):
    told = answer("inspect", "collectives", "--config.mesh.fsdp=4", "--config.mesh.data=2")
    assert told["num_devices"] == 8
    assert {a: n for a, n in told["mesh"].items() if n > 1} == {"data": 2, "fsdp": 4}
    gathers = [
        c
        for c in told["collectives"]
        if c["op"] == "all-gather" and c["scope"].startswith("forward/blocks")
    ]
    assert {tuple(c["axes"]) for c in gathers} == {("fsdp",)}
    assert {c["network"] for c in gathers} == {"ici"}
    # Every kernel of both layers, once, in float32 (the rest is kept for the backward pass).
    assert sum(c["bytes"] for c in gathers) == 2 * LAYER * 4
    assert sum(c["wire_bytes"] for c in gathers) == 2 * LAYER * 4 * 3 // 4
    assert told["wire_bytes"] == sum(c["wire_bytes"] for c in told["collectives"])


def test_plan_inspect_memory_agrees_with_the_plan(answer):
    told = answer("inspect", "memory", "--config.mesh.fsdp=8", "--config.mesh.data=1")
    sharded, whole = 2 * LAYER + 2 * 256 * 64, 5 * 64
    params = (sharded // 8 + whole) * 4
    assert told["state"]["parameters"] == params
    # Two moments, three counters; of a batch the five [B, T] arrays (`row` is for dropout alone).
    memory = told["per_device"]
    assert told["state"]["state"] == 3 * params + 3 * 4
    assert memory["argument_bytes"] == told["state"]["state"] + 256 * 5 * 4
    assert memory["alias_bytes"] == told["state"]["state"]
    assert memory["peak_bytes"] > memory["argument_bytes"] + memory["temp_bytes"]


def test_plan_inspect_verbs_print_tables(capsys):
    assert main(["inspect", "collectives", TINY, *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("mesh: data=8\n") and "all-reduce" in out
    assert "wire bytes per device and step" in out
    assert main(["inspect", "memory", TINY, *SMALL]) == 0
    out = capsys.readouterr().out
    assert "parameters" in out and "temporaries" in out and "KiB" in out
