import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import tracemalloc

import numpy as np
import pytest

from spmd_train.config import ConfigError
from spmd_train.config.schema import DataConfig
from spmd_train.data import open_dataset

TEXTS = [f"document {i} " + "words " * (i % 5) for i in range(50)]
STREAM = b"\0" + b"\0".join(text.encode() for text in TEXTS) + b"\0"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03}.txt").write_text(text)
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("not trained on")
    return DataConfig(
        source="text",
        path=f"{folder}/*.txt",
        eval_path=str(held_out),
        cache_dir=str(tmp_path / "cache"),
        sequence_length=8,
    )


def open_stream(config):
    (stream,) = open_dataset(config, split="train", seed=0).streams
    return stream


def settle(monkeypatch):
    """Lets the files be old enough for their digest to be remembered."""
    now = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: now + 10**10)


def test_cache_holds_the_documents_between_markers(corpus):
    stream = open_stream(corpus)
    assert stream.tokens.dtype == np.uint8
    assert stream.tokens.tobytes() == STREAM
    assert stream.starts.dtype == np.int64
    lengths = [1 + len(text.encode()) for text in TEXTS]
    assert np.diff(stream.starts).tolist() == lengths
    assert (stream.starts[0], stream.starts[-1]) == (0, stream.num_tokens) == (0, sum(lengths))
    metadata = json.loads((stream.path / "metadata.json").read_text())
    assert metadata["num_tokens"] == stream.num_tokens
    assert metadata["num_bytes"] == stream.num_bytes == sum(lengths) - len(TEXTS)


def test_cache_tokens_are_mapped_not_read(corpus):
    stream = open_stream(corpus)
    assert isinstance(stream.tokens.base, np.memmap)
    assert not stream.tokens.flags.writeable


def test_cache_is_built_once(corpus, caplog, monkeypatch):
    settle(monkeypatch)
    caplog.set_level(logging.INFO)
    first = open_stream(corpus)
    assert "tokenizing data.path=" in caplog.text
    caplog.clear()
    monkeypatch.setattr(hashlib, "file_digest", None)  # nor are the files read
    assert open_stream(corpus).path == first.path
    assert not caplog.records


def test_cache_serves_the_same_files_elsewhere(corpus, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = open_stream(corpus)
    caplog.clear()
    (tmp_path / "files").rename(tmp_path / "moved")
    moved = DataConfig(**{**vars(corpus), "path": f"{tmp_path}/moved/*.txt"})
    assert open_stream(moved).path == first.path
    assert not caplog.records


@pytest.mark.parametrize("settled", [True, False])
def test_cache_sees_a_change_that_keeps_size_and_time(corpus, tmp_path, monkeypatch, settled):
    if settled:
        settle(monkeypatch)
    open_stream(corpus)
    path = tmp_path / "files" / "007.txt"
    before = path.stat()
    path.write_text(TEXTS[7].upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    expected = STREAM.replace(TEXTS[7].encode(), TEXTS[7].upper().encode())
    assert open_stream(corpus).tokens.tobytes() == expected


def test_cache_sees_new_removed_and_renamed_files(corpus, tmp_path):
    paths = {open_stream(corpus).path}
    (tmp_path / "files" / "new.txt").write_text("new")
    added = open_stream(corpus)
    assert added.tokens.tobytes() == STREAM + b"new\0"
    (tmp_path / "files" / "new.txt").rename(tmp_path / "files" / "000a.txt")
    renamed = open_stream(corpus)
    assert renamed.tokens.tobytes().startswith(b"\0document 0 \0new\0document 1 ")
    paths |= {added.path, renamed.path}
    (tmp_path / "files" / "000a.txt").unlink()
    assert open_stream(corpus).path in paths
    assert len(paths) == 3


def test_cache_keeps_tokenizers_and_splits_apart(corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "document": 1, "words": 2, "[UNK]": 300}
    paths = []
    for size in (300, 70_000):
        vocab["[UNK]"] = size - 1
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        # The same file, with other content.
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        values = {**vars(corpus), "tokenizer": str(tmp_path / "tokenizer.json")}
        stream = open_stream(DataConfig(**values))
        assert stream.tokens.dtype == (np.uint16 if size == 300 else np.uint32)
        assert stream.tokens[:8].tolist() == [0, 1, size - 1, 0, 1, size - 1, 2, 0]
        paths.append(stream.path)
    eval_path = open_dataset(corpus, split="eval", seed=0).streams[0].path
    assert len({*paths, eval_path, open_stream(corpus).path}) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: (entry / "metadata.json").write_text("{"),
        lambda entry: (entry / "metadata.json").write_text("[]"),
        lambda entry: (entry / "metadata.json").write_text("{}"),
        lambda entry: (entry / "metadata.json").unlink(),
        lambda entry: os.truncate(entry / "tokens.bin", 100),
        lambda entry: os.truncate(entry / "tokens.bin", 0),
        lambda entry: os.truncate(entry / "starts.bin", 12),
        lambda entry: (entry / "starts.bin").unlink(),
    ],
)
def test_cache_damaged_entry_is_made_again(corpus, caplog, damage):
    damage(open_stream(corpus).path)
    assert open_stream(corpus).tokens.tobytes() == STREAM
    assert "damaged: making them again" in caplog.text
    caplog.clear()
    open_stream(corpus)
    assert not caplog.records


SCRIPT = """
import contextlib, json, logging, os, signal, socket, sys, time
from pathlib import Path
from spmd_train.config.schema import DataConfig
from spmd_train.data import cache, open_dataset

logging.basicConfig(level=logging.INFO, force=True)  # absl, imported by grain, was first
here, mode = Path(sys.argv[1]), sys.argv[2]
cache._BATCH_CHARS = 40
read_documents = cache.read_documents

def slowly(*args, **kwargs):
    for index, piece in enumerate(read_documents(*args, **kwargs)):
        if mode == "die" and index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        yield piece

cache.read_documents = slowly
if mode == "hosts":
    cache._locked = contextlib.nullcontext
    socket.gethostname = lambda: f"host{os.getpid()}"
Path(here, f"ready{os.getpid()}").touch()
while mode != "die" and not Path(here, "go").exists():
    time.sleep(0.005)
config = DataConfig(**json.loads(Path(here, "config.json").read_text()))
(stream,) = open_dataset(config, split="train", seed=0).streams
sys.stdout.buffer.write(stream.tokens.tobytes())
"""


def start(corpus, folder, mode):
    (folder / "config.json").write_text(json.dumps(vars(corpus)))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def race(corpus, folder, mode):
    """What two processes that open a cold cache at once read, and what they log."""
    racers = [start(corpus, folder, mode) for _ in range(2)]
    while len(list(folder.glob("ready*"))) < 2:
        assert all(racer.poll() is None for racer in racers)
        time.sleep(0.01)
    (folder / "go").touch()
    results = [racer.communicate(timeout=120) for racer in racers]
    logs = b"".join(error for _, error in results).decode()
    assert [racer.returncode for racer in racers] == [0, 0], logs
    return [output for output, _ in results], logs


def test_cache_two_processes_at_once_build_once(corpus, tmp_path):
    outputs, logs = race(corpus, tmp_path, "race")
    assert outputs == [STREAM, STREAM]
    assert logs.count("tokenizing data.path=") == 1, logs
    assert logs.count("waiting for another process") == 1, logs


def test_cache_two_hosts_that_locks_do_not_reach_agree(corpus, tmp_path):
    outputs, logs = race(corpus, tmp_path, "hosts")
    assert outputs == [STREAM, STREAM]
    assert logs.count("tokenizing data.path=") == 2, logs
    assert len(list((tmp_path / "cache").glob("*/tokens.bin"))) == 1


def test_cache_killed_process_leaves_nothing_that_looks_complete(corpus, tmp_path, caplog):
    victim = start(corpus, tmp_path, "die")
    victim.communicate(timeout=120)
    assert victim.returncode == -signal.SIGKILL
    (leftover,) = (tmp_path / "cache").glob("*.tmp")
    assert (leftover / "tokens.bin").exists()
    assert not list((tmp_path / "cache").glob("*/metadata.json"))
    assert open_stream(corpus).tokens.tobytes() == STREAM
    assert not list((tmp_path / "cache").glob("*.tmp"))
    assert "damaged" not in caplog.text


def test_cache_failure_leaves_nothing_behind(corpus, tmp_path):
    values = {**vars(corpus), "source": "jsonl"}
    with pytest.raises(ConfigError, match="is not JSON"):
        open_stream(DataConfig(**values))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_cache_folder_that_cannot_be_written_is_told(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    values = {**vars(corpus), "cache_dir": str(tmp_path / "file" / "cache")}
    with pytest.raises(ConfigError, match=r"data\.cache_dir='.*cannot put the tokens"):
        open_stream(DataConfig(**values))


def test_cache_folder_defaults_to_the_users_cache(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    stream = open_stream(DataConfig(**{**vars(corpus), "cache_dir": ""}))
    assert stream.path.parent == tmp_path / "xdg" / "spmd-train"


def test_cache_files_that_change_meanwhile_are_told(corpus, tmp_path, monkeypatch):
    from spmd_train.data import cache

    def meddle(*args, **kwargs):
        (tmp_path / "files" / "000.txt").write_text("meddled with")
        return real(*args, **kwargs)

    real = cache.read_documents
    monkeypatch.setattr(cache, "read_documents", meddle)
    with pytest.raises(ConfigError, match="files changed while being tokenized"):
        open_stream(corpus)


def test_cache_memory_is_bounded(corpus, tmp_path):
    line = b"a line of text that is repeated until the file is large\n"
    size = 48_000_000
    (tmp_path / "files" / "large.txt").write_bytes(line * (size // len(line)))
    with open(tmp_path / "files" / "large.jsonl", "w") as file:
        for _ in range(4000):
            file.write(json.dumps({"text": "x" * 10_000}) + "\n")
    text = DataConfig(**{**vars(corpus), "path": f"{tmp_path}/files/large.txt"})
    jsonl = {"source": "jsonl", "path": f"{tmp_path}/files/large.jsonl", "eval_path": ""}
    tracemalloc.start()
    try:
        for config in (text, DataConfig(**{**vars(corpus), **jsonl})):
            tracemalloc.reset_peak()
            stream = open_stream(config)
            assert stream.num_bytes > 35e6
            assert tracemalloc.get_traced_memory()[1] < 16e6  # the corpora: 48e6, 40e6
    finally:
        tracemalloc.stop()
