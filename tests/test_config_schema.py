"""The schema: every key is told, and takes its own default."""

import dataclasses

import pytest

from spmd_train.config import ExperimentConfig, ModelConfig, default_config, describe, parse
from spmd_train.config.keys import Key, keys_of, nearest, paths_of


def all_keys(section: type = ExperimentConfig) -> list[tuple[str, Key]]:
    found = []
    for key in keys_of(section).values():
        found.append((f"{section.__name__}.{key.name}", key))
        if dataclasses.is_dataclass(key.type):
            found += all_keys(key.type)
    return found


@pytest.mark.parametrize("name, key", all_keys())
def test_config_schema_key_is_told_and_takes_its_default(name, key):
    assert key.doc, name
    assert key.allowed
    if not key.is_mapping and not key.is_section:
        assert key.accept(key.default) == key.default
        assert type(key.accept(key.default)) is key.type


def test_config_schema_has_the_keys_that_scripts_set():
    known = set(paths_of(ExperimentConfig))
    contract = {
        "train": "num_steps global_batch_size grad_accumulation seed log_every eval_every "
        "checkpoint_every",
        "mesh": "replica pipeline data fsdp expert context tensor dcn.data dcn.fsdp",
        "model": "num_layers embed_dim num_heads num_kv_heads head_dim mlp_dim vocab_size remat "
        "param_dtype compute_dtype",
        "data": "sequence_length source path tokenizer",
        "optimizer": "name learning_rate weight_decay",
    }
    for section, names in contract.items():
        assert {f"{section}.{name}" for name in names.split()} <= known


def test_config_schema_zero_heads_and_width_resolve():
    assert ModelConfig(num_heads=8, embed_dim=512).resolved_kv_heads == 8
    assert ModelConfig(num_heads=8, num_kv_heads=2).resolved_kv_heads == 2
    assert ModelConfig(num_heads=8, embed_dim=512).resolved_head_dim == 64
    assert ModelConfig(num_heads=8, head_dim=128).resolved_head_dim == 128


@pytest.mark.parametrize(
    "wrong, right",
    [
        ("model.num_layer", "model.num_layers"),
        ("train.num_layers", "model.num_layers"),
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.batch_size", "train.global_batch_size"),
        ("modle.embed_dim", "model.embed_dim"),
        ("mesh.tensors", "mesh.tensor"),
        ("optimizer.warmup_steps", "optimizer.schedule.warmup_steps"),
    ],
)
def test_config_schema_nearest_key_is_the_one_meant(wrong, right):
    assert nearest(wrong, list(paths_of(ExperimentConfig))) == right


def test_config_schema_describe_tells_every_key_and_what_differs():
    config = default_config()
    config.model.num_layers = 7
    config.sharding.rules.mlp = "tensor"
    config.data.mixture.wiki = {"source": "jsonl", "path": "/wiki/*"}
    rows = {row.path: row for row in describe(parse(config))}
    assert rows["model.num_layers"].value == 7
    assert rows["model.num_layers"].default == ModelConfig().num_layers
    changed = {path for path, row in rows.items() if not row.is_default}
    assert changed == {
        "model.num_layers",
        "sharding.rules.mlp",
        "data.mixture.wiki.source",
        "data.mixture.wiki.path",
    }
    assert all(row.meaning and row.allowed for row in rows.values())
    assert "data.mixture.wiki.weight" in rows
    sections = (
        "mesh",
        "mesh.dcn",
        "model",
        "model.rope",
        "optimizer.schedule",
        "sharding.rules",
        "plan.chip",
    )
    leaves = {
        path
        for path in paths_of(ExperimentConfig)
        if path not in sections and path.count(".") > 0 and path != "data.mixture"
    }
    assert leaves <= rows.keys()
