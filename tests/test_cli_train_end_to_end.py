"""A user's session, a process for each command: train, resume, eval, generate, inspect."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def spmd_train(tmp_path):
    """Runs a command line in `tmp_path`, which holds some text; returns the finished process."""
    text = tmp_path / "text"
    text.mkdir()
    for path in (ROOT / "spmd_train").rglob("*.py"):
        name = "-".join(path.relative_to(ROOT).parts)
        (text / name).with_suffix(".txt").write_bytes(path.read_bytes())
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
    }

    def run(*words: str, exits: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "spmd_train", *words],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == exits, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


TRAIN = (
    "train",
    f"--config={ROOT / 'configs' / 'lm_tiny.py'}",
    "--workdir=run",
    "--config.model.num_layers=2",
    "--config.model.embed_dim=32",
    "--config.model.mlp_dim=64",
    "--config.data.source=text",
    "--config.data.path=text/*.txt",
    "--config.data.eval_fraction=0.1",
    "--config.data.sequence_length=64",
    "--config.optimizer.schedule.warmup_steps=2",
    "--config.train.global_batch_size=8",
    "--config.train.log_every=4",
)


def metrics(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["split"], row["step"], row["loss"]) for row in rows]


def test_cli_train_end_to_end(spmd_train, tmp_path):
    workdir = tmp_path / "run"

    first = spmd_train(*TRAIN, "--config.train.num_steps=8")
    assert first.stdout == ""
    assert "a sample:\ndef " in first.stderr
    assert "written to run: config.json, metrics.jsonl" in first.stderr
    assert sorted(p.name for p in workdir.iterdir()) == [
        *(".lock", "checkpoints", "config.json", "goodput.jsonl", "metrics.jsonl", "tensorboard"),
    ]
    after_first = metrics(workdir)
    assert [row[:2] for row in after_first] == [
        *(("train", 1), ("train", 4), ("train", 8), ("eval", 8)),
    ]
    assert after_first[2][2] < after_first[0][2]

    again = spmd_train(*TRAIN, "--config.train.num_steps=8")
    assert "run: finished, 8 steps of 8" in again.stderr
    assert metrics(workdir) == after_first

    spmd_train(*TRAIN, "--config.train.num_steps=12")
    rows = metrics(workdir)
    assert rows[: len(after_first)] == after_first
    assert [row[:2] for row in rows[len(after_first) :]] == [("train", 12), ("eval", 12)]
    assert sorted(int(p.name) for p in (workdir / "checkpoints").iterdir()) == [8, 12]

    # A checkpoint gives what the run itself measured.
    answer = json.loads(spmd_train("eval", "--workdir=run", "--json").stdout)
    assert (answer["split"], answer["step"]) == rows[-1][:2]
    assert answer["loss"] == pytest.approx(rows[-1][2], rel=1e-6)
    assert answer["bits_per_byte"] > 0

    words = "generate --workdir=run --step=8 --prompt=import --prompt=def --max_new_tokens=9"
    answers = json.loads(spmd_train(*words.split(), "--json").stdout)
    assert [answer["prompt"] for answer in answers] == ["import", "def"]
    assert all(answer["continuation"] for answer in answers)

    words = "inspect shardings --config=run/config.json --simulate_devices=8 --config.mesh.fsdp=4"
    plan = json.loads(spmd_train(*words.split(), "--json").stdout)
    assert (plan["mesh"]["data"], plan["mesh"]["fsdp"], plan["num_devices"]) == (2, 4, 8)
    totals = plan["totals"]["parameters"]
    assert totals["bytes"] == 4 * plan["num_parameters"]
    assert totals["bytes_per_device"] < totals["bytes"] / 3


def test_cli_train_end_to_end_a_mistake_writes_nothing(spmd_train, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    done = spmd_train(*TRAIN, "--config.train.num_stps=8", exits=2)
    assert done.stdout == ""
    assert "train.num_stps" in done.stderr and "train.num_steps" in done.stderr
    # One that only shows when the batch meets the mesh.
    done = spmd_train(*TRAIN, "--config.train.global_batch_size=6", "--simulate_devices=4", exits=2)
    assert done.stderr.startswith("spmd-train: train.global_batch_size: 6")
    # And one that only shows when the data is looked for.
    done = spmd_train(*TRAIN, "--config.data.path=nowhere/*.txt", exits=2)
    assert "data.path='nowhere/*.txt' matches no file" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before
