"""`spmd-train convert import` and `export`: from a command line to files, and back."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from interop_helpers import REFERENCE
from safetensors.numpy import load_file

from spmd_train import experiment, training
from spmd_train.checkpoint import Checkpointer, steps
from spmd_train.checkpoint.steps import committed_steps
from spmd_train.cli.main import main
from spmd_train.config import ConfigError, load_config, parse
from spmd_train.interop import huggingface
from spmd_train.train.bad_numbers import Rollbacks

CONFIG = str(Path(__file__).parent.parent / "configs" / "lm_tiny.py")


@pytest.fixture
def hf_dir(tmp_path):
    """A checkpoint with a tokenizer."""
    hf_dir = tmp_path / "hf"
    shutil.copytree(REFERENCE / "llama", hf_dir)
    (hf_dir / "tokenizer.json").write_text('{"version": "1.0"}')
    return hf_dir


def convert(*words: object) -> int:
    return main(["convert", *map(str, words)])


def fitting_overrides(hf_dir, workdir, capsys) -> list[str]:
    """What the first, failing, command says should be added to it."""
    overrides = [
        f"--config.data.tokenizer={hf_dir / 'other.json'}",
        "--config.data.sequence_length=64",
        "--config.optimizer.name=adamw",  # Its state begins with zeros, as is looked at below.
    ]
    import_words = ["import", f"--config={CONFIG}", f"--hf_dir={hf_dir}", f"--workdir={workdir}"]
    assert convert(*import_words, *overrides) == 2
    assert not workdir.exists()
    overrides += re.findall(r"--config\.model\S+", capsys.readouterr().err)
    return overrides


def test_interop_convert_imports_and_exports(hf_dir, tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "out"
    overrides = fitting_overrides(hf_dir, workdir, capsys)
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2"]
    words = ["import", f"--config={CONFIG}", f"--hf_dir={hf_dir}", f"--workdir={workdir}"]
    assert convert(*words, *overrides, *mesh) == 0
    told = capsys.readouterr().out
    assert f"--config.data.tokenizer={hf_dir / 'tokenizer.json'}" in told
    num_parameters = sum(t.size for t in load_file(hf_dir / "model.safetensors").values())
    assert f"{num_parameters:,} parameters" in told

    # The run is one that train goes on from, on another mesh: a whole train state of step 0.
    config = parse(load_config(str(workdir / "config.json"), [("mesh.fsdp", "4")]))
    program = experiment.build(config).program
    with contextlib.closing(Checkpointer(workdir, config.checkpoint, read_only=True)) as saved:
        assert saved.steps() == [0]
        state = saved.restore(0, program.abstract_state)
    assert int(state.step) == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))
    table = load_file(hf_dir / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(state.params["embedding"]["table"], table)

    # A second import would overwrite it.
    assert convert(*words, *overrides) == 2
    assert "has checkpoints already" in capsys.readouterr().err

    below_a_file = f"--hf_dir={workdir / 'config.json' / 'out'}"
    assert convert("export", f"--workdir={workdir}", below_a_file) == 2
    assert re.search(r"--hf_dir=\S+: cannot be .*another folder", capsys.readouterr().err)

    shutil.copyfile(hf_dir / "tokenizer.json", hf_dir / "other.json")
    assert convert("export", f"--workdir={workdir}", f"--hf_dir={out}") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    was, now = load_file(hf_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert was.keys() == now.keys()
    for name in was:
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)
    # The longest that is known to work: lm_tiny's max_positions.
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 2048
    assert convert("export", f"--workdir={workdir}", f"--hf_dir={out}") == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("where", [(huggingface, "_load_leaf"), (Checkpointer, "wait")])
def test_interop_convert_imports_again_after_it_was_killed(
    hf_dir, tmp_path, capsys, monkeypatch, where
):
    workdir = tmp_path / "run"
    words = ["import", f"--config={CONFIG}", f"--hf_dir={hf_dir}", f"--workdir={workdir}"]
    words += fitting_overrides(hf_dir, workdir, capsys)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*where, kill)
        patch.setattr(steps, "commit", lambda *_: None)
        assert convert(*words) == 130
    assert committed_steps(workdir / "checkpoints") == []

    # Training does not begin with random parameters instead.
    config = parse(load_config(str(workdir / "config.json"), []))
    with (
        contextlib.closing(Checkpointer(workdir, config.checkpoint)) as checkpoints,
        pytest.raises(ConfigError, match=r"not finished.*convert import again"),
    ):
        training.start_from(experiment.build(config), checkpoints, Rollbacks(workdir))

    assert convert(*words) == 0
    assert committed_steps(workdir / "checkpoints") == [0]
    assert not (workdir / experiment.UNFINISHED_IMPORT).exists()
    assert convert(*words) == 2
    assert "has checkpoints already" in capsys.readouterr().err
