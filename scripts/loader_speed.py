"""The loader alone: tokens a second of each source and tokenizer, and its memory on large files.

    python scripts/loader_speed.py --table=docs/speed.md
    python scripts/loader_speed.py --made_gib=5 --table=docs/speed.md

The first writes Python's own library as each kind of source, tokenizes it, and reads training
batches through the very iterator that training reads (S of the bench: 16 sequences of 256), on one
core, all threads counted. The second makes files of a given size and of a sixteenth of it, opens
them, reads batches from many places, goes on as a run resumed at a late step does, and tells how
much memory that took, each in a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import sentencepiece
import tokenizers
from array_record.python import array_record_module
from bench import SHAPES, machine
from plan_json import markdown_table
from sections import write_section

from spmd_train.config import DataConfig, parse
from spmd_train.data import Dataset, open_dataset

SHAPE = SHAPES["S"]
TOKENS_PER_BATCH = SHAPE.batch_size * SHAPE.sequence_length
NUM_PLACES, BATCHES_PER_PLACE = 50, 20
LATE_STEP = 10_000_000
_WHAT_IS_WHOSE = (
    "\n\nOwn memory is `RssAnon`; most of it Python and the libraries had before the data was "
    "opened. Tokens and where documents start are files mapped into memory; the pages of a batch "
    "are given back when it is read, and the kernel keeps of them what it has room for. "
    f"Reading: a batch of a run resumed at step 10^7, then {NUM_PLACES * BATCHES_PER_PLACE:,} "
    f"batches in {NUM_PLACES} places."
)


def library() -> list[str]:
    """The standard library's own modules."""
    paths = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [path.read_text(encoding="utf-8", errors="replace") for path in paths]


def paragraphs(texts: list[str]) -> list[str]:
    """Short documents: several in each window."""
    return [part for text in texts for part in text.split("\n\n") if part.strip()]


def write_text(folder: pathlib.Path, texts: list[str]) -> str:
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return f"{folder}/*.txt"


def write_jsonl(folder: pathlib.Path, texts: list[str]) -> str:
    lines = [json.dumps({"text": text}) for text in texts]
    (folder / "a.jsonl").write_text("\n".join(lines))
    return f"{folder}/*.jsonl"


def write_parquet(folder: pathlib.Path, texts: list[str]) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "a.parquet")
    return f"{folder}/*.parquet"


def write_arrayrecord(folder: pathlib.Path, texts: list[str]) -> str:
    writer = array_record_module.ArrayRecordWriter(str(folder / "a.array_record"), "group_size:64")
    for text in texts:
        writer.write(json.dumps({"text": text}).encode())
    writer.close()
    return f"{folder}/*.array_record"


def write_hf_dataset(folder: pathlib.Path, texts: list[str]) -> str:
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder)
    return str(folder)


WRITERS: dict[str, Callable[[pathlib.Path, list[str]], str]] = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrayrecord": write_arrayrecord,
    "hf_dataset": write_hf_dataset,
}


def make_hugging_face(folder: pathlib.Path, texts: list[str]) -> str:
    """A byte-level BPE tokenizer.json of 8,192 tokens, trained on the texts."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return str(folder / "tokenizer.json")


def make_sentencepiece(folder: pathlib.Path, texts: list[str]) -> str:
    """A BPE .model of 8,000 pieces, trained on lines of the texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in texts for line in text.splitlines()][:20_000]),
        model_prefix=str(folder / "pieces"),
        vocab_size=8000,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return str(folder / "pieces.model")


TOKENIZERS: dict[str, Callable[[pathlib.Path, list[str]], str]] = {
    "bytes": lambda folder, texts: "bytes",
    "Hugging Face": make_hugging_face,
    "SentencePiece": make_sentencepiece,
}


def data_config(folder: pathlib.Path, **keys: Any) -> DataConfig:
    """`config.data` with S's windows and a cache below the folder."""
    cache = str(folder / "cache")
    common = {"sequence_length": SHAPE.sequence_length, "cache_dir": cache}
    return parse({"model": {"vocab_size": 1 << 16}, "data": {**common, **keys}}).data


def cpu_seconds_of(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads of this process while it works, and what it returns."""
    begin = time.process_time()
    value = work()
    return time.process_time() - begin, value


def loader_rate(dataset: Dataset, *, num_batches: int) -> float:
    """Tokens per CPU second of the training iterator: the median of five."""
    batches = dataset.batches(global_batch_size=SHAPE.batch_size)
    next(batches)

    def read() -> None:
        for _ in itertools.islice(batches, num_batches):
            pass

    seconds = statistics.median(cpu_seconds_of(read)[0] for _ in range(5))
    batches.close()
    return num_batches * TOKENS_PER_BATCH / seconds


def speeds(folder: pathlib.Path, *, num_batches: int, trainer_rate: float) -> str:
    """A row for each source and tokenizer."""
    documents = library()
    short = paragraphs(documents)
    made = {"stdlib": ("a module", ""), "text": ("a module", documents)}
    made |= {kind: ("a paragraph", short) for kind in WRITERS if kind != "text"}
    keys: dict[str, dict[str, Any]] = {}
    for kind, (_, texts) in made.items():
        path = ""
        if texts:
            (folder / kind).mkdir()
            path = WRITERS[kind](folder / kind, texts)
        keys[kind] = {"source": kind, "path": path}
    keys["mixture"] = {"mixture": {"a": keys["text"], "b": keys["jsonl"]}}
    made["mixture"] = ("text and jsonl in turn", "")
    what_is_told = ("source", "a document is", "tokenizer", "documents")
    rates = ("tokenized, once: tokens/s", "read: tokens/s", "times the trainer")
    lines: list[tuple[str, ...]] = [(*what_is_told, *rates)]
    for kind, (what, _) in made.items():
        for name, make in TOKENIZERS.items():
            if name != "bytes" and kind not in ("text", "jsonl", "mixture"):
                continue  # Another tokenizer changes nothing of how files are read.
            config = data_config(folder, tokenizer=make(folder, documents), **keys[kind])
            spent, dataset = cpu_seconds_of(lambda c=config: open_dataset(c, split="train", seed=0))
            rate = loader_rate(dataset, num_batches=num_batches)
            once = f"{dataset.num_tokens / spent:,.0f}" if kind != "mixture" else "as above"
            count = sum(len(stream.starts) - 1 for stream in dataset.streams)
            ratio = f"{rate / trainer_rate:,.0f}"
            lines.append((f"`{kind}`", what, name, f"{count:,}", once, f"{rate:,.0f}", ratio))
    return markdown_table(lines)


def make_file(path: pathlib.Path, *, kind: str, num_bytes: int) -> None:
    """A file of about so many bytes: the library over and over, each time numbered."""
    short = paragraphs(library())
    written = 0
    with path.open("wb") as file:
        for number in itertools.count():
            if kind == "jsonl":
                lines = (json.dumps({"text": f"{number} {text}"}) + "\n" for text in short)
                block = "".join(lines).encode()
            else:
                block = f"# {number}\n\n".encode() + "\n\n".join(short).encode()
            block = block[: block.rfind(b"\n", 0, num_bytes - written) + 1]
            written += file.write(block)
            if written > num_bytes - (1 << 20) or not block:
                return


def memory_kib() -> dict[str, int]:
    """This process's resident memory now: KiB by name, RssAnon and RssFile."""
    status = pathlib.Path("/proc/self/status").read_text()
    return {name: int(kib) for name, kib in re.findall(r"(Rss\w+):\s+(\d+) kB", status)}


class PeakMemory:
    """The highest RssAnon and RssFile between entering and leaving, looked at 50 times a second."""

    def __enter__(self) -> PeakMemory:
        self.before = memory_kib()["RssAnon"]
        self.anon = self.file = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            now = memory_kib()
            self.anon = max(self.anon, now["RssAnon"])
            self.file = max(self.file, now["RssFile"])
            if self._end.wait(0.02):
                return

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()


def read_all_over(dataset: Dataset) -> float:
    """Batches from the beginning, from a late step, and from many steps.

    Returns:
        Wall seconds until the first batch of the run resumed at the late step.
    """
    begin = time.perf_counter()
    batches = dataset.batches(global_batch_size=SHAPE.batch_size, start_step=LATE_STEP)
    next(batches)
    seconds = time.perf_counter() - begin
    batches.close()
    for place in range(NUM_PLACES):
        batches = dataset.batches(global_batch_size=SHAPE.batch_size, start_step=place * 99_991)
        for _ in itertools.islice(batches, BATCHES_PER_PLACE):
            pass
        batches.close()
    return seconds


def open_and_read(config: DataConfig, *, read: bool) -> dict[str, float]:
    """In a process of its own: opens a data set, then reads it or not; what it took."""
    with PeakMemory() as peak:
        begin = time.perf_counter()
        spent, dataset = cpu_seconds_of(lambda: open_dataset(config, split="train", seed=0))
        opened = time.perf_counter() - begin
        first = read_all_over(dataset) if read else 0.0
    mib = 1 / 1024
    return {
        "num_tokens": dataset.num_tokens,
        "num_documents": sum(len(stream.starts) - 1 for stream in dataset.streams),
        "open_seconds": opened,
        "open_cpu_seconds": spent,
        "first_batch_seconds": first,
        "grown_mib": (peak.anon - peak.before) * mib,
        "anon_mib": peak.anon * mib,
        "file_mib": peak.file * mib,
        "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * mib,
    }


def memory_of(folder: pathlib.Path, *, kind: str, num_bytes: int) -> list[dict[str, float]]:
    """Makes a file, tokenizes it, and opens it again to read; the file is deleted after."""
    folder.mkdir()
    path = folder / f"made.{kind}"
    make_file(path, kind=kind, num_bytes=num_bytes)
    held_out = folder / "eval"
    held_out.write_bytes(b'{"text": "eval"}\n')
    time.sleep(2.1)  # The digest of a file that changed just now is not remembered.
    config = data_config(folder, source=kind, path=str(path), eval_path=str(held_out))
    answers = []
    for read in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            answers.append(pool.apply(open_and_read, (config,), {"read": read}))
    shutil.rmtree(folder)
    return answers


def memories(folder: pathlib.Path, *, gib: float, kinds: list[str]) -> str:
    """A row for tokenizing and one for reading of each file."""
    heads = ("file", "tokens", "documents", "what", "CPU s to open", "s to a batch at step 10^7")
    memory = ("own memory, MiB: peak", "of it since opening", "pages of mapped files", "max RSS")
    lines: list[tuple[str, ...]] = [(*heads, *memory)]
    for kind, size in itertools.product(kinds, (gib / 16, gib)):
        answers = memory_of(folder / kind, kind=kind, num_bytes=int(size * 2**30))
        for what, answer in zip(("tokenized", "opened again, read"), answers, strict=True):
            mib = (answer[name] for name in ("anon_mib", "grown_mib", "file_mib", "max_rss_mib"))
            lines.append(
                (
                    f"`{kind}`, {size:.2f} GiB",
                    f"{answer['num_tokens']:,}",
                    f"{answer['num_documents']:,}",
                    what,
                    f"{answer['open_cpu_seconds']:.2f}",
                    f"{answer['first_batch_seconds']:.3f}" if what != "tokenized" else "",
                    *(f"{value:,.0f}" for value in mib),
                )
            )
            print(*lines[-1], sep=" | ", file=sys.stderr, flush=True)
    return markdown_table(lines) + _WHAT_IS_WHOSE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trainer_tokens_per_second", type=float, default=6000)
    parser.add_argument("--num_batches", type=int, default=500)
    parser.add_argument("--made_gib", type=float, default=0, help="the memory of files this large")
    parser.add_argument("--kinds", default="text,jsonl", help="of made files: text, jsonl")
    parser.add_argument("--folder", type=pathlib.Path, help="for what is made (default: /tmp)")
    parser.add_argument("--table", type=pathlib.Path, help="a page whose section is written anew")
    args = parser.parse_args()
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    facts = machine()
    where = f"One core of an {facts['cpu']}, Python {facts['python']}, {facts['date']}."
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = pathlib.Path(name)
        if args.made_gib:
            heading = "Input: memory"
            text = memories(folder, gib=args.made_gib, kinds=args.kinds.split(","))
            command = f"`python scripts/loader_speed.py --made_gib={args.made_gib:g}`"
        else:
            heading, command = "Input", "`python scripts/loader_speed.py`"
            rate = args.trainer_tokens_per_second
            text = speeds(folder, num_batches=args.num_batches, trainer_rate=rate)
            where += (
                " Rates are per CPU second of all threads: reading is the training iterator, with "
                f"its prefetching. The last column: to the {rate:,.0f} tokens/s that S eats on 2 "
                "such cores."
            )
    text = f"Written by {command}. {where}\n\n{text}\n"
    print(text, end="")
    if args.table:
        write_section(args.table, heading, text)


if __name__ == "__main__":
    main()
