"""What the loader holds in memory hangs neither on the tokens nor on the documents of its data."""

import json
import re
import sys
import tracemalloc
from pathlib import Path

import loader_speed
import numpy as np
import pytest

from spmd_train.config import DataConfig
from spmd_train.data import open_dataset

NUM_TOKENS, NUM_DOCUMENTS = 1 << 31, 1_000_000


@pytest.fixture
def large(tmp_path):
    """A config whose cache entry has grown to 2 GiB of tokens, most of them a hole in the file."""
    (tmp_path / "text.txt").write_text("a document; " * 100)
    config = DataConfig(
        source="text",
        path=f"{tmp_path}/text.txt",
        eval_path=__file__,
        cache_dir=str(tmp_path / "cache"),
        sequence_length=256,
    )
    entry = open_dataset(config, split="train", seed=0).streams[0].path
    with (entry / "tokens.bin").open("r+b") as file:
        file.truncate(NUM_TOKENS + 1)
    np.linspace(0, NUM_TOKENS, NUM_DOCUMENTS + 1, dtype=np.int64).tofile(entry / "starts.bin")
    metadata = json.loads((entry / "metadata.json").read_text())
    metadata |= {"num_tokens": NUM_TOKENS, "num_documents": NUM_DOCUMENTS}
    (entry / "metadata.json").write_text(json.dumps(metadata))
    return config


def test_loader_memory_is_that_of_its_batches(large):
    open_dataset(large, split="train", seed=0).batch(0, global_batch_size=16)  # Imports, caches.
    tracemalloc.start()
    try:
        dataset = open_dataset(large, split="train", seed=0)
        assert dataset.num_sequences == NUM_TOKENS // 256
        for start in (0, 1, 10**6, 10**9, 10**15):
            batches = dataset.batches(global_batch_size=16, start_step=start)
            for _ in range(20):
                assert next(batches)["segment_ids"].max() <= 2
            batches.close()
        (peak,) = tracemalloc.get_traced_memory()[1:]
    finally:
        tracemalloc.stop()
    assert peak < 4e6  # The tokens are 2e9 bytes, where documents start 8e6.


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loader_memory_keeps_no_page_of_what_was_read(large):
    dataset = open_dataset(large, split="train", seed=0)
    for step in range(100):
        dataset.batch(step, global_batch_size=16)
    mapped = Path("/proc/self/smaps").read_text().partition(f"{dataset.streams[0].path}/tokens.bin")
    assert mapped[1]
    resident_kib = re.search(r"Rss:\s+(\d+) kB", mapped[2])
    assert resident_kib and int(resident_kib[1]) < 16 * 1024  # Of 1,600 windows: 100 MB or more.


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_loader_memory_of_real_files_is_bounded(kind, tmp_path):
    small, large = (
        loader_speed.memory_of(tmp_path / str(size), kind=kind, num_bytes=size << 20)
        for size in (8, 256)
    )
    for of_small, of_large in zip(small, large, strict=True):
        assert of_large["num_tokens"] > 30 * of_small["num_tokens"]
        assert of_large["grown_mib"] < of_small["grown_mib"] + 24
        assert of_large["max_rss_mib"] < of_small["max_rss_mib"] + 64
