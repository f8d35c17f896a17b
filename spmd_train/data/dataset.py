"""The loader: what a config says of its data, as batches.

The order is grain's: windows shuffled anew in each epoch of each source, sources mixed in fixed
proportions, all by arithmetic on indices. So the batch of step n is a function of (seed, n, global
batch size) alone, whoever reads which of its rows, and to begin at step n costs nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Sequence

import grain
import numpy as np

from spmd_train.config import ConfigError, DataConfig, SourceConfig
from spmd_train.data.cache import Selection, TokenStream, open_stream
from spmd_train.data.files import find_files
from spmd_train.data.tokenizers import Tokenizer, load_tokenizer
from spmd_train.data.windows import Batch, read_windows


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Dataset:
    """One split, tokenized: one or several sources, cut into windows.

    Training (`batches`) draws whole windows; of each source, the tail that fills none is dropped.
    Evaluation (`epoch`) covers every token of every source.

    Attributes:
      tokenizer: what made the tokens.
      split: train or eval.
      seed: of the order.
      sequence_length: T, tokens in a window.
      names: of the sources.
      streams: their tokens.
      weights: their relative shares of the training batches; grain rounds them to 1%.
      prefetch: batches made ahead.
      num_threads: threads that make them.
    """

    tokenizer: Tokenizer
    split: str
    seed: int
    sequence_length: int
    names: tuple[str, ...]
    streams: tuple[TokenStream, ...]
    weights: tuple[float, ...]
    prefetch: int
    num_threads: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the split that are predicted: those of documents and their ends."""
        return sum(stream.num_tokens for stream in self.streams)

    @property
    def facts(self) -> dict[str, str]:
        """What each source holds, by the name of the source: other facts, other batches."""
        return {
            f"{name} ({self.split})": f"{stream.num_tokens:,} tokens ({stream.path.name[:12]})"
            for name, stream in zip(self.names, self.streams, strict=True)
        }

    @property
    def num_sequences(self) -> int:
        """Windows in one epoch."""
        return int(self._bounds[-1])

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per predicted token, over what the split's batches hold.

        Bits per byte are nats per token / ln 2 / bytes_per_token.
        """
        ratios = [stream.num_bytes / stream.num_tokens for stream in self.streams]
        tokens = [stream.num_tokens for stream in self.streams]
        return float(np.average(ratios, weights=self.weights if self.split == "train" else tokens))

    def batch(
        self, step: int, *, global_batch_size: int, rows: Sequence[int] | slice = slice(None)
    ) -> Batch:
        """The rows of training step `step`; `batches` yields these in turn.

        Args:
          step: from 0.
          global_batch_size: rows of the whole batch.
          rows: which of them; a host reads its own.
        """
        rows_B = _row_indices(rows, global_batch_size)
        example_B = [self._order[step * global_batch_size + row] for row in rows_B.tolist()]
        return self._read(np.array(example_B, np.int64), rows_B)

    def batches(
        self,
        *,
        global_batch_size: int,
        rows: Sequence[int] | slice = slice(None),
        start_step: int = 0,
    ) -> grain.DatasetIterator[Batch]:
        """Training batches from `start_step` on, without end, made ahead in threads.

        Args:
          global_batch_size: rows of the whole batch.
          rows: which of them.
          start_step: step of the first batch.

        Returns:
          An iterator. `close()` it, or drop it, to end its threads.
        """
        make = functools.partial(self.batch, global_batch_size=global_batch_size, rows=rows)
        return self._iterate(grain.MapDataset.range(start_step, sys.maxsize), make)

    def epoch(
        self, *, global_batch_size: int, rows: Sequence[int] | slice = slice(None)
    ) -> grain.DatasetIterator[Batch]:
        """Every window once, in order; the last batch is filled up with padding.

        Args:
          global_batch_size: rows of the whole batch.
          rows: which of them. Each host gets the same number of batches.

        Returns:
          An iterator, as of `batches`.
        """
        rows_B = _row_indices(rows, global_batch_size)

        def make(index: int) -> Batch:
            example_B = index * global_batch_size + rows_B
            return self._read(np.where(example_B < self.num_sequences, example_B, -1), rows_B)

        num_batches = math.ceil(self.num_sequences / global_batch_size)
        return self._iterate(grain.MapDataset.range(num_batches), make)

    def _iterate(
        self, indices: grain.MapDataset[int], make: Callable[[int], Batch]
    ) -> grain.DatasetIterator[Batch]:
        options = grain.ReadOptions(
            num_threads=min(self.num_threads, self.prefetch), prefetch_buffer_size=self.prefetch
        )
        return iter(indices.map(make).to_iter_dataset(options))

    @functools.cached_property
    def _bounds(self) -> np.ndarray:
        """The first example id of each source, and last their number: int64 [num_sources + 1]."""
        partial = 0 if self.split == "train" else self.sequence_length - 1
        counts = [(s.num_tokens + partial) // self.sequence_length for s in self.streams]
        return np.cumsum([0, *counts])

    @functools.cached_property
    def _order(self) -> grain.MapDataset[int]:
        """The example ids of training, without end."""
        sources = []
        for name, low, high in zip(self.names, self._bounds, self._bounds[1:], strict=False):
            # grain adds the epoch to the seed: hash, lest seed 0's second epoch be seed 1's first.
            digest = hashlib.blake2b(f"{self.seed}/{name}".encode(), digest_size=4).digest()
            ids = grain.MapDataset.range(int(low), int(high))
            sources.append(ids.shuffle(seed=int.from_bytes(digest)).repeat())
        return grain.MapDataset.mix(sources, self.weights) if len(sources) > 1 else sources[0]

    def _read(self, example_B: np.ndarray, rows_B: np.ndarray) -> Batch:
        shape = (len(example_B), self.sequence_length)
        batch = {
            name: np.zeros(shape, np.float32 if name == "weights" else np.int32)
            for name in ("tokens", "targets", "segment_ids", "positions", "weights")
        }
        for low, high, stream in zip(self._bounds, self._bounds[1:], self.streams, strict=False):
            (mine,) = np.nonzero((example_B >= low) & (example_B < high))
            if len(mine):
                windows = read_windows(stream, example_B[mine] - low, length=shape[1])
                for name, values in windows.items():
                    batch[name][mine] = values
                stream.forget()
        return {**batch, "row": rows_B.astype(np.int32), "example_id": example_B}


def open_dataset(config: DataConfig, *, split: str, seed: int) -> Dataset:
    """Opens a split, tokenizing what is not in the cache.

    Args:
      config: `config.data`.
      split: `train` or `eval`.
      seed: of the order of training.

    Raises:
      ConfigError: no file matches, a split is empty or shorter than one window, a file does not
        hold what the config says, or a library is missing.
    """
    assert split in ("train", "eval"), split
    tokenizer = load_tokenizer(config.tokenizer)
    sources = _sources(config)
    streams = []
    for key, source in sources.items():
        selection = _select(source, key=key, split=split, eval_fraction=config.eval_fraction)
        stream = open_stream(selection, tokenizer, cache_dir=config.cache_dir)
        if split == "train" and stream.num_tokens < config.sequence_length:
            raise ConfigError(
                f"{selection.files.where}: its training split has {stream.num_tokens} tokens, less "
                f"than one window of data.sequence_length={config.sequence_length}. Add text or "
                "shorten the window"
            )
        streams.append(stream)
    return Dataset(
        tokenizer=tokenizer,
        split=split,
        seed=seed,
        sequence_length=config.sequence_length,
        names=tuple(sources),
        streams=tuple(streams),
        weights=tuple(float(source.weight) for source in sources.values()),
        prefetch=config.prefetch,
        num_threads=config.num_threads,
    )


def _sources(config: DataConfig) -> dict[str, SourceConfig]:
    """The sources by config path; sorted, so that the spelling of a mixture orders nothing."""
    if config.mixture:
        return {f"data.mixture.{name}": config.mixture[name] for name in sorted(config.mixture)}
    return {
        "data": SourceConfig(
            source=config.source,
            path=config.path,
            eval_path=config.eval_path,
            text_key=config.text_key,
        )
    }


def _select(source: SourceConfig, *, key: str, split: str, eval_fraction: float) -> Selection:
    files = find_files(source.source, source.path, key=f"{key}.path")
    if not source.eval_path:
        return Selection(files, source.text_key, split, eval_fraction)
    held_out = find_files(source.source, source.eval_path, key=f"{key}.eval_path")
    both = {p.resolve() for p in files.paths} & {p.resolve() for p in held_out.paths}
    if both:
        raise ConfigError(
            f"{files.where} and {held_out.where} both hold {min(both)}: what is evaluated on must "
            "not be trained on"
        )
    return Selection(held_out if split == "eval" else files, source.text_key, "all", eval_fraction)


def _row_indices(rows: Sequence[int] | slice, global_batch_size: int) -> np.ndarray:
    """Which rows: int64 [B]."""
    every = np.arange(global_batch_size)
    rows_B = every[rows] if isinstance(rows, slice) else np.asarray(rows, np.int64)
    assert ((rows_B >= 0) & (rows_B < global_batch_size)).all(), (rows, global_batch_size)
    return rows_B
