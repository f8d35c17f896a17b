"""Policies by name: what they set, what contradicts them, what a missing library says."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from spmd_train.config import ConfigError, default_config, load_config, parse, to_dict, to_json
from spmd_train.config.schema import PRECISIONS

ROOT = pathlib.Path(__file__).parent.parent
TINY = str(ROOT / "configs" / "lm_tiny.py")
LLAMA = str(ROOT / "configs" / "llama3_8b.py")


def settings(*overrides, file=TINY):
    config = parse(load_config(file, [tuple(o.split("=")) for o in overrides]))
    m, o = config.model, config.optimizer
    return (
        m.param_dtype,
        m.compute_dtype,
        m.quantization,
        o.state_dtype,
        o.stochastic_rounding,
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("custom", ("float32", "float32", "none", "float32", False)),
        ("float32", ("float32", "float32", "none", "float32", False)),
        ("bf16", ("float32", "bfloat16", "none", "float32", False)),
        ("bf16_moments", ("float32", "bfloat16", "none", "bfloat16", False)),
        ("bf16_params", ("bfloat16", "bfloat16", "none", "bfloat16", True)),
        ("int8", ("float32", "bfloat16", "int8", "float32", False)),
        ("fp8", ("float32", "bfloat16", "fp8", "float32", False)),
    ],
)
def test_precision_policy_sets_its_keys(name, wanted):
    assert settings(f"precision={name}") == wanted
    page = (ROOT / "docs" / "precision.md").read_text()
    assert f"| `{name}` |" in page


def test_precision_policies_are_all_there():
    assert len(PRECISIONS) == 7


def test_precision_policy_goes_with_a_config_that_says_the_same():
    assert settings("precision=int8", file=LLAMA)[1:3] == ("bfloat16", "int8")
    assert settings("precision=bf16", "model.compute_dtype=bfloat16")[1] == "bfloat16"
    assert settings("precision=custom", "model.compute_dtype=bfloat16")[1] == "bfloat16"


@pytest.mark.parametrize(
    ("file", "overrides", "told"),
    [
        (LLAMA, ["precision=float32"], "model.compute_dtype = 'bfloat16'"),
        (TINY, ["precision=bf16", "model.param_dtype=bfloat16"], "model.param_dtype=bfloat16"),
        # The default, but said: it must not be passed over.
        (TINY, ["precision=bf16", "model.compute_dtype=float32"], "compute_dtype=float32"),
        (TINY, ["precision=bf16_params", "optimizer.stochastic_rounding=false"], "rounding=false"),
        (TINY, ["model.quantization=int8", "precision=fp8"], "model.quantization=int8"),
    ],
)
def test_precision_policy_contradicted_is_refused(file, overrides, told):
    with pytest.raises(ConfigError) as caught:
        settings(*overrides, file=file)
    assert told in str(caught.value)
    assert "leave that out, or set precision=custom" in str(caught.value)


def test_precision_policy_in_a_file_is_checked_where_a_key_differs():
    config = default_config()
    config.precision = "bf16"
    config.optimizer.state_dtype = "bfloat16"
    with pytest.raises(ConfigError, match=r"precision=bf16 sets optimizer\.state_dtype=float32"):
        parse(config)


def test_precision_policy_survives_a_run_s_config(tmp_path):
    config = parse(load_config(TINY, [("precision", "bf16_params")]))
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    assert parse(load_config(str(file))) == config
    assert json.loads(file.read_text())["model"]["param_dtype"] == "bfloat16"
    assert to_dict(config)["precision"] == "bf16_params"


def test_precision_rounding_without_bfloat16_is_refused():
    with pytest.raises(ConfigError, match="float32 parameters are not rounded"):
        settings("optimizer.stochastic_rounding=true")
    assert settings("optimizer.stochastic_rounding=true", "model.param_dtype=bfloat16")[4]


def test_precision_without_its_library_exits_with_2(tmp_path):
    """As a user without the extra sees it: one message, nothing written."""
    (tmp_path / "qwix.py").write_text("raise ImportError('no qwix here')\n")
    workdir = tmp_path / "run"
    words = ["train", f"--config={TINY}", f"--workdir={workdir}", "--config.precision=int8"]
    done = subprocess.run(
        [sys.executable, "-m", "spmd_train", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'spmd-train[quantization]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not workdir.exists()
