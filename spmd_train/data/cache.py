"""The token cache: the documents of one split of one source, tokenized once.

An entry is a folder of three files, named after a digest of everything that decides what is in it:

    tokens.bin     flat ids, in the smallest unsigned type that holds the vocabulary:
                   marker, document, marker, document, ..., marker
    starts.bin     int64: where each document's marker is, and last where the closing marker is
    metadata.json  counts, and what it was made from

It is written beside its place and moved there when whole, so what has its name is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import mmap
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

from spmd_train.config import ConfigError
from spmd_train.data.documents import read_documents
from spmd_train.data.files import Files, content_digest, stat_signature
from spmd_train.data.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_SCHEMA = 1
_BATCH_CHARS = 1 << 21
_PROGRESS_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which documents, read how.

    Attributes:
      files: where they are.
      text_key: the field that holds the text.
      split: train, eval, or all (then eval_fraction does not matter).
      eval_fraction: share of documents that is held out.
    """

    files: Files
    text_key: str
    split: str
    eval_fraction: float

    def keep(self, identity: str) -> bool:
        """Whether the document of this identity is in the split: by its hash, so for good."""
        if self.split == "all":
            return True
        digest = hashlib.blake2b(identity.encode(errors="surrogateescape"), digest_size=8).digest()
        held_out = int.from_bytes(digest) < self.eval_fraction * 2**64
        return held_out == (self.split == "eval")


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokenized documents of a split, mapped into memory.

    Attributes:
      tokens: ids, unsigned [num_tokens + 1]; the last is the closing marker.
      starts: where documents start, int64 [num_documents + 1]; the last is num_tokens.
      num_bytes: bytes of the text, in UTF-8.
      path: the cache entry, named after what made it: content, tokenizer, split.
      maps: what both arrays are views of.
    """

    tokens: np.ndarray
    starts: np.ndarray
    num_bytes: int
    path: Path
    maps: tuple[mmap.mmap, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens to predict: all but the first marker, which nothing comes before."""
        return len(self.tokens) - 1

    def forget(self) -> None:
        """Takes what was read out of this process; it stays in the kernel's cache of files.

        Without it a process would in time hold all that it has ever read, hundreds of KB a window.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self.maps:
                mapped.madvise(mmap.MADV_DONTNEED)


def open_stream(selection: Selection, tokenizer: Tokenizer, *, cache_dir: str) -> TokenStream:
    """Opens the tokens of a selection, tokenizing them first if no process ever did.

    Raises:
      ConfigError: the split is empty, the files are not what the config says, or the cache folder
        cannot be written.
    """
    root = cache_root(cache_dir)
    files = selection.files
    by_fields = files.kind not in ("text", "stdlib")
    identity = {
        "schema": _SCHEMA,
        "kind": files.kind,
        "text_key": selection.text_key if by_fields else "",
        "content": content_digest(files, memo_dir=root / "digests"),
        "tokenizer": [tokenizer.fingerprint, tokenizer.marker, tokenizer.vocab_size],
        "split": selection.split,
        "eval_fraction": selection.eval_fraction if selection.split != "all" else None,
    }
    entry = root / hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    if stream := _open_entry(entry, dtype):
        return stream
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(entry.with_suffix(".lock")):
            if stream := _open_entry(entry, dtype):
                return stream
            _build(entry, selection, tokenizer, dtype, identity)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={cache_dir!r}: cannot put the tokens of {files.where} into {root}: "
            f"{error}"
        ) from error
    stream = _open_entry(entry, dtype)
    assert stream is not None, entry
    return stream


def cache_root(cache_dir: str) -> Path:
    """`data.cache_dir`, or its default when empty."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "spmd-train"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        logger.info("waiting for another process that tokenizes the same documents (%s)", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _open_entry(entry: Path, dtype: np.dtype) -> TokenStream | None:
    """The entry, or None if it is missing or not whole."""
    try:
        metadata = json.loads((entry / "metadata.json").read_text())
        tokens_map = np.memmap(entry / "tokens.bin", dtype, mode="r")
        starts_map = np.memmap(entry / "starts.bin", np.int64, mode="r")
        # Plain views: indexing a np.memmap makes slow subclass objects.
        tokens, starts = np.asarray(tokens_map), np.asarray(starts_map)
        counts = (len(tokens) - 1, len(starts) - 1, int(starts[-1]))
        expected = (metadata["num_tokens"], metadata["num_documents"], metadata["num_tokens"])
        num_bytes = int(metadata["num_bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if counts != expected:
        return None
    maps: Any = (tokens_map.base, starts_map.base)
    return TokenStream(tokens, starts, num_bytes, entry, maps)


def _build(
    entry: Path,
    selection: Selection,
    tokenizer: Tokenizer,
    dtype: np.dtype,
    identity: dict[str, object],
) -> None:
    """Tokenizes into a folder beside the entry, then moves it into place."""
    files = selection.files
    host = socket.gethostname()
    if entry.exists():
        logger.warning("the cached tokens in %s are damaged: making them again", entry)
        shutil.rmtree(entry)
    # Leftovers of processes killed on this host: the lock says that none of them lives.
    for leftover in entry.parent.glob(f"{entry.name}.{host}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh = entry.with_name(f"{entry.name}.{host}.{uuid.uuid4().hex}.tmp")
    fresh.mkdir()
    try:
        before, _ = stat_signature(files)
        counts = _write(fresh, selection, tokenizer, dtype)
        if stat_signature(files)[0] != before:
            raise ConfigError(f"{files.where}: files changed while being tokenized; run it again")
        metadata = {**counts, "where": files.where, **identity}
        with _durable(fresh / "metadata.json") as file:
            file.write(json.dumps(metadata, indent=1).encode())
        try:
            fresh.rename(entry)
        except OSError:
            # Where locks do not reach other hosts, another may have been faster.
            if _open_entry(entry, dtype) is None:
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(
    folder: Path, selection: Selection, tokenizer: Tokenizer, dtype: np.dtype
) -> dict[str, int]:
    """Writes tokens.bin and starts.bin, and returns the counts."""
    where = f"{selection.files.where} ({selection.split})"
    logger.info("tokenizing %s: %d files, once", where, len(selection.files.paths))
    num_tokens = num_documents = num_bytes = 0
    began = reported = time.monotonic()
    marker = np.array([tokenizer.marker], dtype)
    pieces = read_documents(selection.files, text_key=selection.text_key, keep=selection.keep)
    with _durable(folder / "tokens.bin") as tokens_file, _durable(folder / "starts.bin") as starts:
        for batch in _batches(pieces):
            parts = []
            for (_, begins), ids in zip(
                batch, tokenizer.encode_batch([text for text, _ in batch]), strict=True
            ):
                if begins:
                    starts.write(np.int64(num_tokens).tobytes())
                    parts.append(marker)
                    num_tokens += 1
                    num_documents += 1
                parts.append(ids)
                num_tokens += len(ids)
            tokens = np.concatenate(parts)
            largest = tokens.max(initial=0)
            assert largest < tokenizer.vocab_size, (largest, tokenizer.vocab_size)
            tokens_file.write(tokens.astype(dtype, copy=False).data)
            num_bytes += sum(len(text.encode()) for text, _ in batch)
            if (now := time.monotonic()) - reported > _PROGRESS_SECONDS:
                reported = now
                rate = num_bytes / 1e6 / (now - began)
                logger.info(
                    "%s: %.1f MB, %d tokens, %.1f MB/s", where, num_bytes / 1e6, num_tokens, rate
                )
        if not num_documents:
            raise ConfigError(_empty_split(selection))
        tokens_file.write(marker.data)
        starts.write(np.int64(num_tokens).tobytes())
    seconds = time.monotonic() - began
    logger.info("%s: %d tokens in %.1f s", where, num_tokens, seconds)
    return {"num_tokens": num_tokens, "num_documents": num_documents, "num_bytes": num_bytes}


def _batches(pieces: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Groups pieces so that a tokenizer has enough for its threads, in bounded memory."""
    batch, size = [], 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _empty_split(selection: Selection) -> str:
    files = selection.files
    if selection.split == "all":
        return f"{files.where}: its {len(files.paths)} files hold no text"
    return (
        f"{files.where}: no document falls into the {selection.split} split: whole documents are "
        f"held out, and {len(files.paths)} files with eval_fraction={selection.eval_fraction} have "
        "too few. Name files to evaluate on as eval_path, change data.eval_fraction, or do without "
        "evaluation: train.eval_every=0"
    )


@contextlib.contextmanager
def _durable(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when closed: renames can outrun data in a power cut."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
