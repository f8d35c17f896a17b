"""Loading: files, overrides, and files that mean harm."""

import json
import pathlib
import random
import shutil
import sys

import pytest
from ml_collections import ConfigDict

from spmd_train.config import ConfigError, ExperimentConfig, load_config, parse, to_dict, to_json


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "my.py") -> str:
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


DEFAULT = "from spmd_train.config import default_config as get_config"


def test_config_load_passes_the_argument(write):
    path = write(
        "from spmd_train.config import default_config\n"
        "def get_config(arg='1'):\n"
        "    config = default_config()\n"
        "    config.model.num_layers = int(arg)\n"
        "    return config\n"
    )
    assert load_config(path).model.num_layers == 1
    assert load_config(path + ":12").model.num_layers == 12


@pytest.mark.parametrize(
    "text, told",
    [
        ("x = 1", "has no function get_config"),
        ("def get_config(): return 3", "must return an ml_collections.ConfigDict"),
        ("def get_config(:", "my.py:1: SyntaxError"),
        ("def get_config():\n  x = {}\n  return x['a']", "my.py:3: KeyError: 'a'"),
        ("import no_such_module", "my.py:1: ModuleNotFoundError"),
    ],
)
def test_config_load_file_mistakes_are_the_users(write, text, told):
    with pytest.raises(ConfigError) as caught:
        load_config(write(text))
    assert told in str(caught.value)


def test_config_load_argument_for_a_file_without_one(write):
    with pytest.raises(ConfigError, match="takes no argument, but got :3"):
        load_config(write(DEFAULT) + ":3")


@pytest.mark.parametrize(
    "flag", ["nope.py", "nope/config.json", "config.yaml", "", "a\0.json", "."]
)
def test_config_load_refuses_flags_that_name_no_config(flag):
    with pytest.raises(ConfigError, match="--config="):
        load_config(flag)


def test_config_load_file_prints_to_standard_error(write, capsys):
    load_config(write(f"print('hello')\n{DEFAULT}"))
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


@pytest.mark.parametrize(
    "path, text, value",
    [
        ("train.num_steps", "20", 20),
        ("train.num_steps", "1_000", 1000),
        ("train.num_steps", "1e3", 1000),
        ("mesh.fsdp", "-1", -1),
        ("model.tied_head", "true", True),
        ("model.tied_head", "0", False),
        ("model.tied_head", "True", True),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", "1", 1.0),
        ("data.path", "/a=b/*.txt", "/a=b/*.txt"),
        ("sample.prompt", "", ""),
        ("sample.prompt", "1", "1"),
        ("model.rope.theta", "500000", 500000.0),
        ("mesh.dcn.data", "2", 2),
    ],
)
def test_config_load_overrides_have_the_declared_type(write, path, text, value):
    config = load_config(
        write(DEFAULT),
        [("mesh.data", "1"), ("data.source", "text"), ("data.path", "x"), (path, text)],
    )
    found = to_dict(parse(config))
    for name in path.split("."):
        found = found[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "path, text, told",
    [
        ("train.num_steps", "1.5", "train.num_steps = '1.5': must be a whole number"),
        ("train.num_steps", "", "must be a whole number"),
        ("train.num_steps", "inf", "must be a whole number"),
        ("train.num_steps", "9" * 5000, "must be a whole number"),
        ("train.num_steps", "1e300", "must be a whole number"),
        ("model.tied_head", "yes", "model.tied_head = 'yes': must be true or false"),
        ("optimizer.learning_rate", "nan", "must be a number"),
        ("optimizer.learning_rate", "fast", "optimizer.learning_rate = 'fast': must be a number"),
        ("model.num_layer", "3", "the nearest is model.num_layers"),
        ("modle.num_layers", "3", "modle.num_layers = '3': there is no such key"),
        ("model", "3", "must be a section"),
        ("model.num_layers.x", "3", "num_layers is a value, with no keys below it"),
        ("", "3", "there is no such key"),
        ("train..num_steps", "3", "there is no such key"),
        ("data.mixture.wiki", "3", "data.mixture.wiki = '3': must be a section"),
        ("data.mixture.wiki.weight", "much", "data.mixture.wiki.weight = 'much': must be a number"),
        ("data.mixture.wiki.pth", "x", "the nearest is data.mixture.wiki.path"),
    ],
)
def test_config_load_refuses_wrong_overrides(write, path, text, told):
    with pytest.raises(ConfigError) as caught:
        parse(load_config(write(DEFAULT), [(path, text)]))
    assert told in str(caught.value)


def test_config_load_overrides_reach_free_form_names(write):
    config = parse(
        load_config(
            write(DEFAULT),
            [
                ("sharding.rules.residual_sequence", "tensor"),
                ("sharding.overrides.blocks/mlp/.*", "none,fsdp"),
                ("sharding.overrides.a.b", "tensor"),
                ("data.mixture.wiki.path", "/wiki"),
                ("data.mixture.wiki.weight", "2"),
                ("data.mixture.v1.2.source", "stdlib"),
            ],
        )
    )
    assert config.sharding.rules == {"residual_sequence": "tensor"}
    assert config.sharding.overrides == {"blocks/mlp/.*": "none,fsdp", "a.b": "tensor"}
    assert config.data.mixture["wiki"].path == "/wiki"
    assert config.data.mixture["wiki"].weight == 2.0
    assert config.data.mixture["v1.2"].source == "stdlib"


def test_config_load_overrides_a_files_own_mappings_and_references(write):
    path = write(
        "from spmd_train.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.sharding.overrides = {'a.b': 'fsdp'}\n"
        "    config.data.mixture = {'code': {'source': 'stdlib'}}\n"
        "    config.model.mlp_dim = 4 * config.model.get_ref('embed_dim')\n"
        "    config.lock()\n"
        "    return config\n"
    )
    config = parse(
        load_config(
            path,
            [
                ("sharding.overrides.c.d", "tensor"),
                ("data.mixture.wiki.path", "/wiki"),
                ("model.embed_dim", "64"),
            ],
        )
    )
    assert config.sharding.overrides == {"a.b": "fsdp", "c.d": "tensor"}
    assert set(config.data.mixture) == {"code", "wiki"}
    assert config.model.mlp_dim == 256


def test_config_load_takes_a_config_dict_made_by_hand(write):
    path = write(
        "import ml_collections\n"
        "def get_config():\n"
        "    return ml_collections.ConfigDict({'train': {'num_steps': 5}}).lock()\n"
    )
    overrides = [("train.num_steps", "x"), ("sharding.overrides.a.b", "fsdp")]
    config = load_config(path, overrides)
    with pytest.raises(ConfigError, match=r"1 problem .*\n  train.num_steps = 'x'"):
        parse(config)


def test_config_load_overrides_fill_what_a_file_leaves_open(write):
    path = write(
        "from ml_collections.config_dict import required_placeholder\n"
        "from spmd_train.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        "    config.train.num_steps = required_placeholder(int)\n"
        "    return config\n"
    )
    with pytest.raises(ConfigError, match=r"train\.num_steps: has no value"):
        parse(load_config(path, [("train.seed", "1")]))
    assert parse(load_config(path, [("train.num_steps", "9")])).train.num_steps == 9


def test_config_load_files_build_on_each_other(write):
    write(DEFAULT, "base.py")
    path = write(
        "import pathlib\n"
        "from spmd_train.config import load_config\n"
        "def get_config():\n"
        "    base = pathlib.Path(__file__).with_name('base.py')\n"
        "    return load_config(str(base), [('train.num_steps', '3')])\n"
    )
    assert parse(load_config(path)).train.num_steps == 3


def test_config_load_takes_a_frozen_config(write):
    path = write(
        "from ml_collections import FrozenConfigDict\n"
        "def get_config():\n"
        "    return FrozenConfigDict({'train': {'num_steps': 5}})\n"
    )
    config = parse(load_config(path, [("sharding.rules.mlp", "data"), ("train.seed", "3")]))
    assert (config.train.num_steps, config.train.seed) == (5, 3)
    assert config.sharding.rules == {"mlp": "data"}


def test_config_load_json_overrides(write):
    path = write(to_json(ExperimentConfig()), "config.json")
    assert parse(load_config(path)) == ExperimentConfig()
    assert parse(load_config(path, [("train.num_steps", "7")])).train.num_steps == 7


def test_config_load_json_runs_no_code(write):
    path = write(json.dumps({"__class__": "os.system", "_fields": {}, "get_config": 3}), "c.json")
    with pytest.raises(ConfigError, match="3 problems"):
        parse(load_config(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '"x"',
        '{"model": NaN}',
        '{"model": {"num_layers": NaN}}',
        '{"optimizer": {"learning_rate": Infinity}}',
        '{"optimizer": {"learning_rate": 1e999}}',
        '{"train": {"num_steps": ' + "9" * 4000 + "}}",
        '{"train": {"num_steps": ' + "9" * 5000 + "}}",
        '{"optimizer": {"learning_rate": ' + "9" * 4000 + "}}",
        '{"optimizer": {"learning_rate": true}}',
        '{"train": {"num_steps": true}}',
        '{"train": {"num_steps": 3.0}}',
        '{"train": {"num_steps": "3"}}',
        '{"train": {"num_steps": [3]}}',
        '{"train": {"num_steps": {}}}',
        '{"train": []}',
        '{"train": null}',
        '{"train.num_steps": 3}',
        '{"": {"": ""}}',
        '{"' + "x" * 100_000 + '": 3}',
        '{"items": 3, "keys": 4, "_fields": {}, "lock": 1}',
        '{"sample": {"prompt": "\\ud800"}}',
        '{"\\ud800": 3}',
        '{"sharding": {"rules": {"\\u0000": "fsdp"}}}',
        '{"sharding": {"overrides": {"((((": "fsdp"}}}',
        '{"sharding": {"overrides": {"a{99999999999}": "fsdp"}}}',
        '{"data": {"mixture": {"": {"path": "x"}}}}',
        '{"a":' * 15 + "1" + "}" * 15,
        '{"a":' * 900 + "1" + "}" * 900,
        '{"a":' * 100_000 + "1" + "}" * 100_000,
        '{"model": ' + "[" * 900 + "]" * 900 + "}",
        "[" * 100_000,
    ],
    ids=lambda text: text[:32],
)
def test_config_load_ill_formed_json_is_the_users_mistake(write, text):
    with pytest.raises(ConfigError) as caught:
        parse(load_config(write(text, "config.json")))
    assert len(str(caught.value)) < 2000
    str(caught.value).encode()  # Can be printed.


def test_config_load_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(str(path))


def test_config_load_fuzzed_json_never_crashes(write):
    draw = random.Random(0)
    text = to_json(ExperimentConfig())
    odd = [None, -1, 0, 1.5, 1e300, 2**70, "", "x", "-", [], [1], {}, {"a": {"b": 1}}, True, "\0"]
    refused = 0

    def mutate(data):
        name = draw.choice(list(data))
        if isinstance(data[name], dict) and data[name] and draw.random() < 0.8:
            mutate(data[name])
        elif draw.random() < 0.2:
            data[name + draw.choice(["", "x", ".y", "\n"])] = data.pop(name)
        else:
            data[name] = draw.choice(odd)

    for trial in range(300):
        if trial % 2:
            data = json.loads(text)
            for _ in range(draw.randint(1, 4)):
                mutate(data)
            mutated = json.dumps(data)
        else:
            at = draw.randrange(len(text))
            mutated = text[:at] + chr(draw.randrange(1, 128)) + text[at + draw.randint(0, 3) :]
        try:
            parse(load_config(write(mutated, "config.json")))
        except ConfigError:
            refused += 1
    assert 100 < refused < 300


def test_config_load_returns_a_config_dict_to_edit(write):
    config = load_config(write(DEFAULT))
    assert isinstance(config, ConfigDict)
    config.train.num_steps = 9
    assert parse(config).train.num_steps == 9


def test_config_load_finds_the_installed_configs_outside_a_checkout(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = pathlib.Path(__file__).parent.parent / "configs"
    shutil.copytree(configs, tmp_path / "prefix/share/spmd-train/configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "prefix"))
    assert load_config("configs/lm_tiny.py").model.num_layers == 4
    with pytest.raises(ConfigError, match=r"configs/lm_tiny2\.py: there is no such file"):
        load_config("configs/lm_tiny2.py")
