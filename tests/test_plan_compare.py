"""`inspect hlo`: a program as XLA has it, and what differs between two."""

import json
import pathlib

import pytest

from spmd_train.cli.main import main

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
TINY = f"--config={CONFIGS / 'lm_tiny.py'}"
SMALL = [
    "--simulate_devices=8",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=64",
    "--config.model.scan_unroll=1",
    "--config.optimizer.name=adamw",
]
FSDP = ["--diff.mesh.data=1", "--diff.mesh.fsdp=8"]
LAYER = 4 * 64 * 64 + 3 * 64 * 352


def run(capsys, *words, code=0):
    assert main(["inspect", "hlo", TINY, *SMALL, *words]) == code
    return capsys.readouterr()


def test_plan_compare_tells_what_a_change_of_mesh_does(capsys):
    told = json.loads(run(capsys, *FSDP, "--json").out)
    first, second = told["programs"]
    assert [p["mesh"]["data"] for p in (first, second)] == [8, 1]
    assert second["name"].endswith("lm_tiny.py mesh.data=1 mesh.fsdp=8")
    # The first config's -1 is what the user wrote; both keys differ, and no other.
    assert {row["key"]: (row["first"], row["second"]) for row in told["config"]} == {
        "mesh.data": (-1, 1),
        "mesh.fsdp": (1, 8),
    }
    totals = told["totals"]
    # Moments and parameters of two layers and two tables, of which fsdp leaves an eighth.
    sharded = 3 * 4 * (2 * LAYER + 2 * 256 * 64)
    one, other = totals["argument_bytes"]
    assert one - other == sharded - sharded // 8
    assert totals["matmul_flops"][0] == totals["matmul_flops"][1] > 0
    assert totals["num_instructions"][0] < totals["num_instructions"][1]
    gathers = [row for row in told["collectives"] if row["axes"] == ["fsdp"]]
    assert gathers and all(
        row["first"] == {"count": 0, "bytes": 0, "wire_bytes": 0} for row in gathers
    )
    weights = [
        r for r in gathers if r["op"] == "all-gather" and r["scope"].startswith("forward/bl")
    ]
    assert sum(row["second"]["bytes"] for row in weights) == 2 * LAYER * 4
    for side, place in (("first", 0), ("second", 1)):
        wire = sum(row[side]["wire_bytes"] for row in told["collectives"])
        assert wire == totals["wire_bytes"][place]


def test_plan_compare_of_a_program_with_itself_finds_nothing(capsys):
    told = json.loads(run(capsys, f"--diff={CONFIGS / 'lm_tiny.py'}", "--json").out)
    assert told["config"] == [] and told["collectives"]
    assert all(row["same"] and row["first"] == row["second"] for row in told["collectives"])
    del told["totals"]["compile_seconds"]
    assert all(one == other for one, other in told["totals"].values())


def test_plan_compare_writes_both_programs_and_prints_a_table(capsys, tmp_path):
    out = run(capsys, *FSDP, f"--out={tmp_path / 'step.hlo'}").out
    assert "A: " in out and ": data=8\n" in out and ": fsdp=8\n" in out
    (line,) = [line for line in out.splitlines() if line.startswith("mesh.fsdp")]
    assert line.split() == ["mesh.fsdp", "1", "8"]
    (line,) = [line for line in out.splitlines() if line.startswith("matmul FLOPs")]
    assert line.endswith("=")
    assert "all-gather" not in (tmp_path / "step.hlo").read_text()
    assert "all-gather" in (tmp_path / "step.hlo.diff").read_text()


def test_plan_compare_prints_one_program(capsys, tmp_path):
    assert run(capsys, "--stage=lowered").out.startswith("module @jit")
    path = tmp_path / "program.txt"
    told = json.loads(run(capsys, f"--out={path}", "--json").out)
    assert told["stage"] == "compiled" and "hlo" not in told
    assert told["hlo_bytes"] == len(path.read_bytes())
    assert path.read_text().startswith("HloModule")


@pytest.mark.parametrize(
    "words, told",
    [
        (["--diff.mesh.fdsp=8"], "there is no such key; the nearest is mesh.fsdp"),
        (["--diff.mesh.fdsp=8"], "--diff.mesh.fdsp=8): 1 problem in the config"),
        (["--diff.mesh.fsdp"], "write --diff.mesh.fsdp=VALUE"),
        (["--dif.mesh.fsdp=8"], "no such flag: --dif.mesh.fsdp=8; the nearest is --diff.mesh.fsdp"),
        (["--diff=nowhere.py"], "there is no such file"),
        (["--stage=linked"], "'linked' must be compiled or lowered"),
        ([*FSDP, "--stage=lowered"], "--diff compares what the compiler made"),
    ],
)
def test_plan_compare_refuses_wrong_words(words, told, capsys):
    assert told in run(capsys, *words, code=2).err


def test_plan_compare_is_no_other_verbs_flag(capsys):
    assert main(["inspect", "memory", TINY, "--diff.mesh.fsdp=8"]) == 2
    assert "no such flag: --diff.mesh.fsdp=8" in capsys.readouterr().err
