"""A restart that is not what made the checkpoint: what is told, refused, or free."""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import re

import fault_helpers as faults
import pytest

from spmd_train import cluster
from spmd_train.checkpoint.drift import FREE, changes, check_drift
from spmd_train.cli.main import main
from spmd_train.config import (
    CheckpointConfig,
    ConfigError,
    ExperimentConfig,
    describe,
    load_config,
    parse,
    to_dict,
)


def config(**changes):
    pairs = [(key.replace("__", "."), str(value)) for key, value in changes.items()]
    return parse(load_config(str(faults.ROOT / "configs" / "lm_tiny.py"), pairs))


BASE = {"optimizer__schedule__name": "constant", "optimizer__schedule__decay_steps": 0}


@pytest.mark.parametrize(
    "change, is_free",
    [
        ({"mesh__fsdp": 4}, True),
        ({"train__checkpoint_every": 7}, True),
        ({"train__grad_accumulation": 2}, True),
        ({"model__remat": "full"}, True),
        ({"observe__tensorboard": "false"}, True),
        ({"train__num_steps": 1000}, True),
        ({"train__global_batch_size": 24}, False),
        ({"optimizer__learning_rate": 0.5}, False),
        ({"train__seed": 5}, False),
        ({"data__sequence_length": 64}, False),
        ({"model__compute_dtype": "bfloat16"}, False),
    ],
)
def test_drift_tells_what_changes_the_maths(change, is_free):
    maths, harmless = changes(to_dict(config(**BASE)), to_dict(config(**BASE, **change)))
    (key,) = change
    (told,) = harmless if is_free else maths
    assert told.startswith(f"config.{key.replace('__', '.')}: ")
    assert len(maths) + len(harmless) == 1


@pytest.mark.parametrize(
    "name, decay, is_free", [("cosine", 0, False), ("cosine", 50, True), ("wsd", 5, False)]
)
def test_drift_more_steps_matter_where_the_schedule_ends_with_them(name, decay, is_free):
    schedule = {
        "optimizer__schedule__name": name,
        "optimizer__schedule__warmup_steps": 0,
        "optimizer__schedule__decay_steps": decay,
    }
    one, other = (to_dict(config(train__num_steps=n, **schedule)) for n in (100, 200))
    maths, harmless = changes(one, other)
    assert harmless if is_free else maths
    assert not (maths if is_free else harmless)


def test_drift_every_free_key_is_one_of_the_schema():
    paths = [row.path for row in describe(ExperimentConfig())]
    for pattern in FREE.pattern.strip("()").split("|"):
        assert pattern.count("(") != pattern.count(")") or any(
            FREE.fullmatch(path) for path in paths
        )
    free = {path for path in paths if FREE.fullmatch(path)}
    assert {"train.check_replicas_every", "observe.straggler_every", "mesh.dcn.data"} <= free
    assert not {"train.seed", "train.num_steps", "loss.z_loss", "model.num_layers"} & free


def test_drift_policies(caplog):
    caplog.set_level(logging.INFO, logger="spmd_train")
    now = to_dict(config(**BASE))
    before = to_dict(config(**BASE, train__global_batch_size=24, mesh__fsdp=2))
    facts = cluster.code_facts()
    meta = {"config": before, "made_by": {**facts, "jax": "0.9.1", "gone": "1"}}
    policy = CheckpointConfig()
    check_drift(meta, config=now, facts=facts, policy=policy)
    assert f"jax: 0.9.1 -> {facts['jax']}" in caplog.text
    assert "config.train.global_batch_size: 24 -> 8" in caplog.text and "gone" not in caplog.text
    assert "freely: config.mesh.fsdp: 2 -> 1" in caplog.text
    refuse = dataclasses.replace(policy, on_drift="refuse")
    with pytest.raises(ConfigError, match=r"jax: 0.9.1 -> (.|\n)*global_batch_size: 24 -> 8"):
        check_drift(meta, config=now, facts=facts, policy=refuse)
    caplog.clear()
    ignore = dataclasses.replace(policy, on_drift="ignore")
    check_drift(meta, config=now, facts=facts, policy=ignore)
    check_drift({"config": now, "made_by": facts}, config=now, facts=facts, policy=refuse)
    check_drift({}, config=now, facts=facts, policy=refuse)
    assert not caplog.text


def test_drift_is_refused_at_a_restart(tmp_path, capsys, caplog):
    def words(**changes):
        return faults.command(
            tmp_path / "run",
            devices=0,
            train__checkpoint_every=2,
            mesh__fsdp=2,
            mesh__tensor=2,
            **changes,
        )

    assert main(words(train__num_steps=2)) == 0
    lines = (tmp_path / "run" / "goodput.jsonl").read_bytes()
    changed = {"train__num_steps": 4, "data__text_key": "body"}
    assert main(words(checkpoint__on_drift="refuse", **changed)) == 2
    assert "config.data.text_key: 'text' -> 'body'" in capsys.readouterr().err
    assert (tmp_path / "run" / "goodput.jsonl").read_bytes() == lines, "nothing is written"
    assert main(words(**changed)) == 0
    assert "config.data.text_key: 'text' -> 'body'" in caplog.text
    assert "train.num_steps: 2 -> 4" in caplog.text


def test_drift_of_the_data_is_told(tmp_path, capsys, caplog):
    """Other content under the same name: other batches."""
    words = faults.command(tmp_path / "run", devices=0, train__num_steps=2)
    assert main(words) == 0
    (path,) = [word.partition("=")[2] for word in words if word.startswith("--config.data.path=")]
    with pathlib.Path(path).open("a") as file:
        file.write("more")
    words.append("--config.train.num_steps=3")
    assert main([*words, "--config.checkpoint.on_drift=refuse"]) == 2
    told = r"data \(train\): [\d,]+ tokens \(\w{12}\) -> [\d,]+ tokens \(\w{12}\)"
    assert re.search(told, capsys.readouterr().err)
    assert main(words) == 0
    assert re.search(told, caplog.text)
