"""Strangers' files: damaged at random they are refused, and nothing worse happens."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import fault_helpers as faults
import ml_dtypes
import numpy as np
import pytest
import sentencepiece
import tokenizers
from safetensors.numpy import save_file

from spmd_train.checkpoint import steps
from spmd_train.config import ExperimentConfig, to_dict, to_json
from spmd_train.observe import Goodput, JsonlWriter
from spmd_train.train.bad_numbers import BadStepError, write_bundle

REFERENCE = pathlib.Path(__file__).parent / "fixtures" / "reference"
FUZZ = pathlib.Path(__file__).parent / "fuzz_files.py"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder for each kind of file."""
    root = tmp_path_factory.mktemp("whole")
    for kind in ("run", "hf", "tensors", "index", "tokens", "pieces"):
        (root / kind).mkdir()
    (root / "run" / "config.json").write_text(to_json(ExperimentConfig()))
    shutil.copy(next(REFERENCE.glob("llama*/config.json")), root / "hf")
    arrays = {"a": np.zeros((4, 8), np.float32), "b": np.ones(6, ml_dtypes.bfloat16)}
    save_file(arrays, root / "tensors" / "model.safetensors")
    save_file(arrays, root / "index" / "model-1.safetensors")
    weight_map = {"weight_map": dict.fromkeys(arrays, "model-1.safetensors")}
    (root / "index" / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    step = root / "step" / "7"
    for name in ("state/a", "state/b", "meta/metadata"):
        (step / name).parent.mkdir(parents=True, exist_ok=True)
        (step / name).write_bytes(name.encode() * 50)
    steps.commit(root / "step", 7)
    batch = {"tokens": np.arange(64, dtype=np.int32).reshape(2, 32)}
    config = to_dict(ExperimentConfig())
    made = write_bundle(root, BadStepError(3, "bad"), config=config, batch_number=2, batch=batch)
    for kind in ("bundle", "batch"):
        shutil.copytree(made, root / kind)
    for kind in ("account", "metrics"):
        (root / kind).mkdir()
        with Goodput(root / kind) as goodput:
            goodput.begin(0)
            with goodput.span("save"):
                goodput.write(saved=1)
            goodput.stepped(2)
            goodput.begin(1)
            goodput.stepped(2)
        writer = JsonlWriter(root / kind / "metrics.jsonl")
        for step in range(1, 6):
            values = {"loss": 1.0, "step_seconds": 1.0, "slowest_seconds": 0.5}
            writer.write(step, "train", values | {"slowest_process": 1, "tokens_per_second": 9.0})
        writer.close()
    words = {"<s>": 0, "</s>": 1, "hello": 2, "world": 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer.save(str(root / "tokens" / "tokenizer.json"))
    corpus = root / "corpus.txt"
    corpus.write_text("\n".join(f"hello world {i}" for i in range(100)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(root / "pieces" / "pieces"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return root


def fuzz(whole, folder, *, seed, rounds):
    shutil.copytree(whole, folder)
    done = subprocess.run(
        [sys.executable, str(FUZZ), str(folder), str(seed), str(rounds)],
        env=faults.environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=3000,
    )
    assert done.returncode == 0, f"{done.returncode}\n{done.stdout}\n{done.stderr[-6000:]}"
    told = json.loads(done.stdout.splitlines()[-1])["accepted_refused"]
    for kind, (accepted, refused) in told.items():
        assert accepted + refused == rounds, kind
        # A manifest's faults are told, not raised; lines that are none are passed over.
        told_otherwise = kind in ("step", "account", "metrics")
        assert refused > rounds / 4 or told_otherwise, f"{kind}: hardly anything was refused"


def test_files_fuzzed_are_refused(whole, tmp_path):
    fuzz(whole, tmp_path / "files", seed=0, rounds=60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_files_fuzzed_long(whole, tmp_path, seed):
    fuzz(whole, tmp_path / "files", seed=seed, rounds=3000)
