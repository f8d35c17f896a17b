"""What a target names, and what is said where it cannot be had."""

import logging
import os
import threading

import pytest

from spmd_train import cluster
from spmd_train.config import ConfigError
from spmd_train.parallel.chips import CHIPS
from spmd_train.plan import topologies
from spmd_train.plan.targets import GPUS, TPUS, parse_target


def test_plan_targets_are_read():
    target = parse_target("2xv5p:4x4x8")
    assert (target.platform, target.chip_name) == ("tpu", "v5p")
    assert (target.num_slices, target.shape, target.num_chips) == (2, (4, 4, 8), 256)
    assert target.chip is CHIPS["v5p"] and target.wraps == (True, True, True)
    assert parse_target("v5e:8x16").wraps == (False, True)
    assert parse_target("v5p:2x4x4").wraps == (False,) * 3
    gpus = parse_target("h100:4x8")
    assert (gpus.platform, gpus.num_chips, gpus.chip) == ("gpu", 32, CHIPS["h100"])
    assert parse_target("a100:1x8").chip is CHIPS["a100-80gb"]
    cpus = parse_target("cpu:8")
    assert (cpus.platform, cpus.num_chips, cpus.chip) == ("cpu", 8, None)


@pytest.mark.parametrize(
    "text, told",
    [
        ("v9:4x4", "no such chip: v9; known are cpu:N; TPUs v4, v5e, v5p"),
        ("v5e", "cannot be read; known are"),
        ("v5e:4x4x4", "a v5e slice has 2 dims, as in v5e:4x4"),
        ("v5p:4x4", "a v5p slice has 3 dims"),
        ("h100:8", "write nodes x GPUs, as in h100:4x8"),
        ("2xh100:4x8", "only TPUs come in slices"),
        ("cpu:2x2", "write the number of devices"),
        ("cpu:0", "every size must be at least 1"),
    ],
)
def test_plan_targets_that_are_none_are_refused(text, told):
    with pytest.raises(ConfigError, match="--target=") as caught:
        parse_target(text)
    assert told in str(caught.value)


def test_plan_targets_have_chips_with_sources():
    for name in (*TPUS, *(chip or word for word, chip in GPUS.items())):
        chip = CHIPS[name]
        assert chip.source.startswith("https://") and chip.ici_bandwidth
        assert chip.network_source.startswith("https://")


@pytest.mark.parametrize("text, extra", [("v5e:2x2", "plan-tpu"), ("h100:1x8", "plan-cuda")])
def test_plan_target_without_its_compiler_says_what_to_install(text, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(cluster, "cache_home", lambda: tmp_path)
    monkeypatch.setattr(topologies.jax.config, "update", lambda *args: None)
    with (
        pytest.raises(ConfigError, match=rf"pip install 'spmd-train\[{extra}\]'"),
        topologies.open_target(parse_target(text)),
    ):
        pass


def test_plan_targets_are_compiled_for_one_at_a_time(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(cluster, "cache_home", lambda: tmp_path)
    order = []
    waits = threading.Event()
    caplog.set_level(logging.INFO, logger="spmd_train")
    logging.getLogger("spmd_train").addHandler(_Setter(waits))

    def second():
        with topologies._only_one():
            order.append("second")

    with topologies._only_one():
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(timeout=30)
        order.append("first")
    thread.join(timeout=30)
    logging.getLogger("spmd_train").handlers.pop()
    assert order == ["first", "second"]
    assert "another process compiles for a target" in caplog.text
    assert os.listdir(tmp_path) == ["plan.lock"]


class _Setter(logging.Handler):
    def __init__(self, event):
        super().__init__()
        self.event = event

    def emit(self, record):
        self.event.set()
