"""Parsing: what is refused, how it is told, and the way to JSON and back."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import required_placeholder

from spmd_train.config import (
    ConfigError,
    ExperimentConfig,
    SourceConfig,
    default_config,
    load_config,
    parse,
    to_dict,
    to_json,
)

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
FLAGS = [
    *map(str, CONFIGS),
    *(f"{path}:3.1" for path in CONFIGS if path.name.startswith("llama3")),
]


def set_key(config: ConfigDict, path: str, value) -> ConfigDict:
    *sections, name = path.split(".")
    for section in sections:
        config = config[section]
    config[name] = value
    return config


def refusal(**keys) -> str:
    """The message for the default config with these keys; `__` stands for a dot."""
    config = default_config()
    for path, value in keys.items():
        set_key(config, path.replace("__", "."), value)
    with pytest.raises(ConfigError) as caught:
        parse(config)
    return str(caught.value)


def test_config_parse_default_is_the_schema():
    assert parse(default_config()) == ExperimentConfig()


def test_config_parse_missing_keys_have_defaults():
    config = parse(ConfigDict({"model": {"num_layers": 3}}))
    assert config == dataclasses.replace(
        ExperimentConfig(), model=dataclasses.replace(ExperimentConfig().model, num_layers=3)
    )


@pytest.mark.parametrize(
    "path, value, allowed",
    [
        ("model.num_layers", "4", "must be a whole number, at least 1"),
        ("model.num_layers", 4.0, "must be a whole number, at least 1"),
        ("model.num_layers", True, "must be a whole number, at least 1"),
        ("model.num_layers", None, "must be a whole number, at least 1"),
        ("model.num_layers", 0, "must be a whole number, at least 1"),
        ("model.num_layers", 2**63, "must be a whole number, at least 1"),
        pytest.param("model.num_layers", 10**5000, "must be a whole number", id="endless"),
        ("model.tied_head", 1, "must be true or false"),
        ("model.tied_head", "true", "must be true or false"),
        ("model.norm", "rmsnrm", "must be one of rmsnorm, layernorm; the nearest is rmsnorm"),
        ("precision", "bfloat16", "fp8; the nearest is bf16"),
        ("context.method", "ring_attention", "ulysses; the nearest is ring"),
        ("pipeline.schedule", "1F1B", "zero_bubble; the nearest is 1f1b"),
        ("train.num_steps", 10**20, "must be a whole number, at least 1, at most 2147483647"),
        ("train.num_steps", 2**31, "must be a whole number, at least 1, at most 2147483647"),
        ("model.num_layers", 10**20, "at least 1, at most 9223372036854775807"),
        ("model.norm", 3, "must be one of rmsnorm, layernorm"),
        ("model.dropout", 1.0, "must be a number, at least 0, at most 0.99"),
        ("model.norm_epsilon", 0, "must be a number, above 0"),
        ("optimizer.learning_rate", float("nan"), "must be a number, at least 0"),
        ("optimizer.learning_rate", float("inf"), "must be a number, at least 0"),
        ("optimizer.learning_rate", "1e-3", "must be a number, at least 0"),
        ("data.path", 3, "must be text"),
        ("data.path", "a\0b", "must be text without NUL"),
        ("sample.prompt", "\ud800", "must be text without NUL or half surrogate pairs"),
        ("train.seed", 2**31, "at most 2147483647"),
        ("mesh.fsdp", 0, "must be a whole number, at least 1, or -1"),
        ("mesh.fsdp", -2, "must be a whole number, at least 1, or -1"),
        ("mesh.dcn.data", -1, "must be a whole number, at least 1"),
        ("model", 3, "must be a section of the keys num_layers"),
        ("model.rope", "none", "must be a section of the keys theta"),
        ("sharding.rules", "tensor", "must be names of your own, set as rules.NAME=VALUE"),
        ("sharding.rules.mlp", None, "must be text"),
        ("data.mixture.wiki", 3, "must be a section of the keys source, path"),
        ("data.mixture.wiki", {"path": 3}, "must be text"),
    ],
)
def test_config_parse_refuses_wrong_values(path, value, allowed):
    message = refusal(**{path.replace(".", "__"): value})
    assert f"{path}" in message
    assert allowed in message
    assert len(message) < 1500


def test_config_parse_suggests_no_choice_that_is_not_like_the_value():
    assert refusal(optimizer__offload="cpu").endswith("'cpu': must be one of none, host")


def test_config_parse_refusal_shows_path_and_value():
    assert "model.num_layers = 0: must be" in refusal(model__num_layers=0)
    assert "model.remat = 'fulll': must be" in refusal(model__remat="fulll")


@pytest.mark.parametrize(
    "path, value, told",
    [
        (
            "model.num_layer",
            3,
            "model.num_layer = 3: there is no such key; the nearest is model.num_layers",
        ),
        ("train.num_heads", 3, "the nearest is model.num_heads"),
        (
            "modle",
            {"num_layers": 3},
            "modle.num_layers = 3: there is no such key; the nearest is model.num_layers",
        ),
        (
            "data.mixture.wiki",
            {"pth": "x", "path": "x"},
            "wiki.pth = 'x': there is no such key; the nearest is data.mixture.wiki.path",
        ),
        ("model.\x1b[31m", 3, r"model.'\x1b[31m' = 3: there is no such key"),
    ],
)
def test_config_parse_unknown_key_names_the_nearest(path, value, told):
    assert told in refusal(**{path.replace(".", "__"): value})


def test_config_parse_tells_all_problems_at_once():
    message = refusal(
        model__num_layers=0,
        train__num_stps=3,
        optimizer__name="adam",
        mesh__fsdp=-1,
        train__grad_accumulation=3,
    )
    assert message.startswith("5 problems in the config:")
    for told in ("num_layers = 0", "num_stps", "'adam'", "mesh.data = -1", "grad_accumulation = 3"):
        assert told in message


def test_config_parse_cuts_endless_problems():
    message = refusal(**{f"model__wrong_{i}": i for i in range(1000)})
    assert message.startswith("1000 problems")
    assert message.endswith("and 980 more")


def test_config_parse_refused_value_is_no_contradiction_too():
    message = refusal(model__num_heads="six", model__num_kv_heads=5)
    assert message.startswith("1 problem ")


@pytest.mark.parametrize(
    "keys, told",
    [
        (
            {"model.num_heads": 6, "model.embed_dim": 96, "model.num_kv_heads": 4},
            "must divide num_heads",
        ),
        ({"model.embed_dim": 250}, "num_heads must divide embed_dim, or set model.head_dim"),
        ({"model.head_dim": 33}, "must be even"),
        ({"model.remat": "names"}, "names to save or to offload go with model.remat=names"),
        ({"model.remat_saved": "query"}, "names to save or to offload go with model.remat=names"),
        ({"model.remat": "names", "model.remat_saved": "query,kye"}, "the nearest is key"),
        (
            {
                "model.remat": "names",
                "model.remat_saved": "up",
                "model.remat_offloaded": "gate,up",
            },
            "up must be in one of them",
        ),
        (
            {"model.remat": "names", "model.remat_saved": "gate", "model.mlp": "gelu"},
            "only swiglu has a gate",
        ),
        (
            {"model.remat": "names", "model.remat_saved": "query,up", "moe.num_experts": 4},
            "'up' is of an MLP that all tokens share",
        ),
        ({"model.embed_dim": 20}, "must be even"),
        ({"model.rope.scaling": "llama3", "model.rope.low_freq_factor": 4.0}, "must be less than"),
        ({"loss.chunk_tokens": 100}, "chunk_tokens must divide sequence_length"),
        ({"loss.chunk_tokens": 512}, "chunk_tokens must divide sequence_length"),
        (
            {"train.grad_accumulation": 5},
            "must divide global_batch_size; the nearest that does is 4",
        ),
        ({"train.grad_accumulation": 10**9}, "the nearest that does is 16"),
        ({"plan.silence": "unused-axs"}, "the nearest is unused-axis"),
        ({"mesh.fsdp": -1}, "at most one axis may be -1"),
        ({"mesh.replica": 2}, "mesh.replica = 2: this axis is not yet possible in this version"),
        ({"pipeline.virtual_stages": 2}, "only the schedule interleaved"),
        ({"mesh.expert": 2}, "a dense model has no experts to shard"),
        ({"mesh.data": 1, "mesh.replica": -1}, "not yet possible"),
        ({"mesh.dcn.replica": 2}, "mesh.dcn.replica = 2: this axis is not yet possible"),
        ({"data.source": "jsonl"}, "a jsonl source needs data.path"),
        ({"data.path": "/x/*.txt"}, "stdlib reads no files; set data.source"),
        (
            {"data.source": "jsonl", "data.path": "x", "data.text_key": ""},
            "field that holds the text",
        ),
        ({"data.mixture.wiki": {"source": "text"}}, "a text source needs data.mixture.wiki.path"),
        ({"data.mixture.wiki": {"source": "stdlib", "path": "x"}}, "stdlib reads no files"),
        ({"data.mixture": {"a/b": {"path": "x"}}}, "letters, digits"),
        ({"data.tokenizer": "byte"}, "must be bytes, or the path of a tokenizer.json"),
        ({"model.vocab_size": 128}, "bytes need a vocab_size of at least 256"),
        ({"model.positions": "learned", "model.max_positions": 128}, "at least sequence_length"),
        ({"optimizer.schedule.name": "wsd"}, "wsd needs the number of steps"),
        (
            {"optimizer.schedule.name": "constant", "optimizer.schedule.decay_steps": 3},
            "constant does not decay",
        ),
        (
            {"optimizer.schedule.decay_steps": 5, "optimizer.schedule.warmup_steps": 5},
            "must come after warmup_steps",
        ),
        ({"optimizer.weight_decay_exclude": "("}, "must be a regular expression"),
        ({"sharding.rules.mlp": "tensr"}, "the nearest is tensor"),
        ({"sharding.rules.mlp": ""}, "is no mesh axis"),
        ({"sharding.rules.mlp": "data+data"}, "only one dim"),
        ({"sharding.overrides": {"a.b": "fsdp,none,fsdp"}}, "only one dim"),
        ({"sharding.overrides": {"a(": "fsdp"}}, "must be a regular expression"),
    ],
)
def test_config_parse_refuses_contradictions(keys, told):
    message = refusal(**{path.replace(".", "__"): value for path, value in keys.items()})
    assert told in message
    assert message.startswith("1 problem ")


@pytest.mark.parametrize(
    "keys",
    [
        {"model.embed_dim": 250, "model.head_dim": 64},
        {"model.num_kv_heads": 1},
        {"model.embed_dim": 20, "model.positions": "learned"},
        {"loss.chunk_tokens": 64},
        {"mesh.data": 1, "mesh.fsdp": -1, "mesh.tensor": 2},
        {"mesh.dcn.data": 4},
        {"data.mixture.wiki": {"path": "/x"}, "data.path": "/unread"},
        {"data.tokenizer": "/x/tokenizer.json", "model.vocab_size": 100},
        {"optimizer.schedule.warmup_steps": 2000, "train.num_steps": 3},
        {"sharding.rules.mlp": "none", "sharding.overrides": {"x/.*": "data+fsdp, none ,tensor"}},
        {"optimizer.learning_rate": np.float32(0.5), "train.num_steps": np.int64(7)},
        {"optimizer.learning_rate": 1},
    ],
)
def test_config_parse_allows(keys):
    config = default_config()
    for path, value in keys.items():
        set_key(config, path, value)
    assert parse(load_text(to_json(parse(config)))) == parse(config)


def load_text(text: str) -> ConfigDict:
    return ConfigDict(json.loads(text), allow_dotted_keys=True)


def test_config_parse_value_that_must_still_be_set():
    assert "train.num_steps: has no value" in refusal(train__num_steps=required_placeholder(int))


def test_config_parse_is_frozen_and_typed():
    config = default_config()
    config.data.mixture.wiki = {"path": "/x", "weight": 2}
    parsed = parse(config)
    assert parsed.data.mixture == {"wiki": SourceConfig(path="/x", weight=2.0)}
    assert type(parsed.data.mixture["wiki"].weight) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        parsed.train.num_steps = 3


def test_config_parse_order_of_a_mixture_does_not_matter_but_of_patterns_does():
    def parsed(names, patterns):
        return parse(
            {
                "data": {"mixture": {name: {"path": name} for name in names}},
                "sharding": {"overrides": dict.fromkeys(patterns, "none")},
            }
        )

    assert to_json(parsed("abc", ())) == to_json(parsed("cab", ()))
    assert list(parsed("a", ("z", "b.c", "a")).sharding.overrides) == ["z", "b.c", "a"]


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.rpartition("/")[2])
def test_config_parse_files_round_trip_through_json(flag, tmp_path):
    config = parse(load_config(flag))
    path = tmp_path / "config.json"
    path.write_text(to_json(config))
    again = parse(load_config(str(path)))
    assert again == config
    assert to_json(again) == to_json(config)
    assert json.loads(to_json(config)) == to_dict(config)


@pytest.mark.parametrize(
    "name, published",
    [
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("lm_100m", None),
        ("lm_tiny", None),
    ],
)
def test_config_parse_files_have_the_size_they_tell(name, published):
    (path,) = [path for path in CONFIGS if path.stem == name]
    m = parse(load_config(str(path))).model
    heads = 2 * m.num_heads + 2 * m.resolved_kv_heads
    layer = m.embed_dim * (heads * m.resolved_head_dim + 3 * m.mlp_dim + 2)
    count = m.num_layers * layer + m.embed_dim * (2 * m.vocab_size + 1)
    if published:
        assert count == published
        assert f"{count:,}" in path.read_text()
    else:
        told = {"lm_tiny": "0.9 million", "lm_100m": "100 million"}[name]
        assert told in path.read_text()
        assert count == pytest.approx(float(told.split()[0]) * 1e6, rel=0.05)


def test_config_parse_llama_rope_is_as_published():
    path = str(CONFIGS[0].parent / "llama3_70b.py")
    plain, scaled = (
        parse(load_config(path)).model.rope,
        parse(load_config(path + ":3.1")).model.rope,
    )
    assert (plain.theta, plain.scaling) == (500_000.0, "none")
    assert dataclasses.astuple(scaled) == (500_000.0, "llama3", 8.0, 1.0, 4.0, 8192)
