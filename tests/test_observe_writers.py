"""Metric writers: strict JSON lines, resumption, repair, TensorBoard, Weights & Biases."""

import json
import math
import pathlib
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from spmd_train.config import ConfigError, ObserveConfig
from spmd_train.observe import (
    JsonlWriter,
    TensorBoardWriter,
    WandbWriter,
    Writers,
    check_writers,
    make_writers,
    read_jsonl,
)


def strict_lines(path: pathlib.Path) -> list[dict]:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def write_steps(path: pathlib.Path, steps, *, resume_step: int = 0, loss: float = 1.0) -> None:
    writer = JsonlWriter(path, resume_step=resume_step)
    for step in steps:
        writer.write(step, "train", {"loss": loss})
    writer.close()


def test_observe_jsonl_line_is_strict_json_with_full_precision(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path, now=lambda: 1234.5)
    values = {
        "third": 1 / 3,
        "tiny": 5e-324,
        "float32": np.float32(0.1),
        "device": jnp.asarray(0.25),
        "count": 7,
        "missing": None,
        "nan": math.nan,
        "up": math.inf,
        "down": np.float32("-inf"),
    }
    writer.write(3, "eval", values)
    (line,) = strict_lines(path)  # it is there before close
    assert (line["step"], line["split"], line["time"]) == (3, "eval", 1234.5)
    assert line["third"] == 1 / 3 and line["tiny"] == 5e-324 and line["device"] == 0.25
    assert np.float32(line["float32"]) == np.float32(0.1)
    assert line["count"] == 7 and line["missing"] is None
    assert (line["nan"], line["up"], line["down"]) == ("NaN", "Infinity", "-Infinity")
    (read,) = read_jsonl(path)
    assert math.isnan(read["nan"]) and read["up"] == math.inf and read["down"] == -math.inf
    assert read["split"] == "eval" and read["missing"] is None
    writer.close()


def test_observe_jsonl_resumed_reads_as_one_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 9), loss=1.0)
    write_steps(path, range(5, 11), resume_step=4, loss=2.0)
    lines = strict_lines(path)
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["loss"] for line in lines] == [1.0] * 4 + [2.0] * 6
    assert list(tmp_path.iterdir()) == [path]


def test_observe_jsonl_without_a_restored_step_begins_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(0, 5))
    write_steps(path, range(0, 2), loss=3.0)
    assert [(line["step"], line["loss"]) for line in strict_lines(path)] == [(0, 3.0), (1, 3.0)]


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 3, "spl', b"\x00\x00\x00\x00", b"\xff\xfe{", b'{"split": "train"}\n', b"[]\n"],
    ids=["cut", "zeros", "not utf-8", "no step", "no object"],
)
def test_observe_jsonl_repairs_what_a_killed_process_left(tmp_path, tail, caplog):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, (1, 2))
    with path.open("ab") as file:
        file.write(tail)
    assert [line["step"] for line in read_jsonl(path)] == [1, 2]
    write_steps(path, (3,), resume_step=2)
    assert [line["step"] for line in strict_lines(path)] == [1, 2, 3]
    assert "1 unreadable" in caplog.text


def test_observe_jsonl_keeps_a_whole_last_line_without_its_newline(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_steps(path, (1, 2))
    path.write_bytes(path.read_bytes()[:-1])
    write_steps(path, (3,), resume_step=2)
    assert [line["step"] for line in strict_lines(path)] == [1, 2, 3]


def tensorboard_events(folder: pathlib.Path) -> list[list[Event]]:
    """Events of each file, in the files' order: TFRecords of (length, crc, data, crc)."""
    files = []
    for path in sorted(folder.iterdir()):
        data, events = path.read_bytes(), []
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
        files.append(events)
    return files


def test_observe_tensorboard_holds_scalars_by_split(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write(2, "train", {"loss": 0.5, "mfu": None})
    writer.write(4, "eval", {"loss": np.float32(0.25)})
    writer.close()
    ((*events,),) = tensorboard_events(tmp_path)
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(2, "train/loss", 0.5), (4, "eval/loss", 0.25)]


@pytest.mark.parametrize(("resume_step", "purged_from"), [(4, 5), (0, 0)])
def test_observe_tensorboard_resumed_hides_the_later_steps(tmp_path, resume_step, purged_from):
    writer = TensorBoardWriter(tmp_path, resume_step=resume_step)
    writer.close()
    (events,) = tensorboard_events(tmp_path)
    starts = [e.step for e in events if e.session_log.status == e.session_log.START]
    assert starts == [purged_from]


class FakeWandb(types.ModuleType):
    """Stands in for the package wandb: remembers what it was told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.logged, self.metrics, self.finished = [], [], [], 0

    def init(self, **kwargs):
        self.inits.append(kwargs)
        return self

    def define_metric(self, name, step_metric=None):
        self.metrics.append((name, step_metric))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished += 1


def test_observe_wandb_logs_and_resumes_the_same_run(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for resume_step in (0, 10, 0):
        writer = WandbWriter(
            "proj", workdir=tmp_path, resume_step=resume_step, run_config={"a": {"b": 1}}
        )
        writer.write(11, "train", {"loss": np.float32(0.5), "mfu": None})
        writer.close()
    first, resumed, anew = wandb.inits
    assert first["project"] == "proj" and first["config"] == {"a": {"b": 1}}
    assert first["id"] == resumed["id"] != anew["id"]
    assert resumed["resume"] == "allow"
    assert ("*", "step") in wandb.metrics
    assert wandb.logged == [{"step": 11, "train/loss": 0.5}] * 3
    assert wandb.finished == 3


def test_observe_wandb_missing_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    config = ObserveConfig(wandb_project="proj")
    for refuse in (make_writers, lambda config, **_: check_writers(config)):
        with pytest.raises(ConfigError, match=r"observe\.wandb_project.*pip install"):
            refuse(config, workdir=tmp_path / "run", run_config={})
    assert not (tmp_path / "run").exists()


def test_observe_make_writers_writes_what_the_config_asks_for(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = ObserveConfig(tensorboard=True, wandb_project="proj")
    with make_writers(config, workdir=tmp_path, run_config={"seed": 1}) as writers:
        writers.write(1, "train", {"loss": 2.0})
    assert strict_lines(tmp_path / "metrics.jsonl")[0]["loss"] == 2.0
    ((*events,),) = tensorboard_events(tmp_path / "tensorboard")
    assert any(v.tag == "train/loss" for e in events for v in e.summary.value)
    assert wandb.logged == [{"step": 1, "train/loss": 2.0}] and wandb.finished == 1
    with make_writers(ObserveConfig(tensorboard=False), workdir=tmp_path / "b", run_config={}):
        pass
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_observe_writers_close_all_even_if_one_fails():
    closed = []

    class Broken:
        def write(self, step, split, values):
            pass

        def close(self):
            closed.append("broken")
            raise OSError("disk full")

    class Sound(Broken):
        def close(self):
            closed.append("sound")

    with pytest.raises(OSError, match="disk full"):
        Writers([Sound(), Broken(), Sound()]).close()
    assert sorted(closed) == ["broken", "sound", "sound"]
