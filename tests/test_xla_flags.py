"""The table of XLA's flags, and whose value counts."""

import os

import pytest

from spmd_train import xla_flags
from spmd_train.plan.targets import parse_target
from spmd_train.plan.topologies import compiler_options

ASYNC = "xla_enable_async_all_gather"
SCATTERS = "xla_gpu_reduce_scatter_combine_threshold_bytes"


@pytest.fixture
def environ(monkeypatch):
    for name in (*xla_flags.VARIABLES.values(), "SPMD_TRAIN_XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_xla_flags_are_set_where_the_user_has_not(environ):
    environ.setenv("LIBTPU_INIT_ARGS", f"--xla_other=1 --{ASYNC}=false")
    xla_flags.set_flags()
    once = {name: os.environ[name] for name in xla_flags.VARIABLES.values()}
    words = once["LIBTPU_INIT_ARGS"].split()
    assert words[:2] == ["--xla_other=1", f"--{ASYNC}=false"]
    assert sorted(word.partition("=")[0] for word in words[1:]) == sorted(
        f"--{name}" for name in xla_flags.FLAGS["tpu"]
    )
    assert "--xla_cpu_experimental_ynn_fusion_type=-individual_dot" in once["XLA_FLAGS"]
    assert f"--{SCATTERS}=1048576" in once["XLA_FLAGS"].split()
    xla_flags.set_flags()
    assert once == {name: os.environ[name] for name in xla_flags.VARIABLES.values()}


def test_xla_flags_can_be_switched_off(environ):
    environ.setenv("SPMD_TRAIN_XLA_FLAGS", "off")
    xla_flags.set_flags()
    assert {os.environ[name] for name in xla_flags.VARIABLES.values()} == {""}
    assert compiler_options(parse_target("v5p:2x2x1")) == {}
    assert SCATTERS not in compiler_options(parse_target("h100:1x8"))


def test_xla_flags_of_a_plan_are_those_of_training(environ):
    environ.setenv("LIBTPU_INIT_ARGS", f"--{ASYNC}=false")
    options = compiler_options(parse_target("v5p:2x2x1"))
    assert options.keys() == xla_flags.FLAGS["tpu"].keys()
    assert options.pop(ASYNC) is False
    assert options.pop("xla_jf_crs_combiner_threshold_in_bytes") == "4194304"
    assert set(options.values()) == {True}
    assert compiler_options(parse_target("cpu:8")) == {}
    assert compiler_options(parse_target("h100:1x8"))[SCATTERS] == "1048576"
    environ.setenv("XLA_FLAGS", f"--{SCATTERS}=7")
    assert compiler_options(parse_target("h100:1x8"))[SCATTERS] == "7"


def test_xla_flags_of_bfloat16_are_a_programs_own(environ):
    """On CPUs that multiply it; not where the user has said which of YNNPACK's fusions to make."""
    environ.setattr(xla_flags, "_multiplies_bfloat16", lambda: True)
    (name,) = xla_flags.FLAGS["cpu"]
    options = xla_flags.program_options("cpu", compute_dtype="bfloat16")
    assert options.keys() == {name} and "INDIVIDUAL_DOT" in options[name]
    assert not xla_flags.program_options("tpu", compute_dtype="bfloat16")
    assert not xla_flags.program_options("cpu", compute_dtype="float32")
    xla_flags.set_flags()
    assert xla_flags.program_options("cpu", compute_dtype="bfloat16") == options
    environ.setenv("XLA_FLAGS", f"--{name}=-dot")
    assert not xla_flags.program_options("cpu", compute_dtype="bfloat16")
    environ.delenv("XLA_FLAGS")
    environ.setattr(xla_flags, "_multiplies_bfloat16", lambda: False)
    assert not xla_flags.program_options("cpu", compute_dtype="bfloat16")


def test_xla_flags_all_say_why_and_who():
    for flags in xla_flags.FLAGS.values():
        for name, flag in flags.items():
            assert name.startswith("xla_") and flag.why and flag.source
