"""Text to token ids and back: bytes, Hugging Face `tokenizer.json`, SentencePiece `.model`.

Only data is read: nothing that comes with a tokenizer file is ever executed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import sentencepiece
import tokenizers

from spmd_train.config import ConfigError

_BEGINNINGS = (
    "<|begin_of_text|>",
    "<s>",
    "<bos>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "[BOS]",
    "</s>",
    "<eos>",
    "[EOS]",
)
"""Tokens that may mark documents, by preference, if a tokenizer.json inserts none by itself."""


class Tokenizer(Protocol):
    """What the rest of the room needs of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def marker(self) -> int:
        """The id that begins each document, and that ends the one before it."""
        ...

    @property
    def fingerprint(self) -> str:
        """A digest of everything that decides which ids a text gets."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text (integers, [num_tokens]), with no marker added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; markers are left out, impossible bytes become U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0..255; documents are marked by 0, which text does not use."""

    vocab_size = 256
    marker = 0
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of each text: uint8 [num_bytes]."""
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without markers."""
        return bytes(i for i in ids if i != self.marker).decode(errors="replace")


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library.

    The marker is the first token that its own template puts before a text, else the first of
    `<|begin_of_text|>`, `<s>`, `<bos>`, `<|endoftext|>`, ... that it knows.
    """

    def __init__(self, path: str):
        data = _read(path)
        self.fingerprint = "tokenizers:" + hashlib.blake2b(data, digest_size=16).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # the Rust library raises bare Exception
            raise ConfigError(
                f"data.tokenizer={path!r} is not a Hugging Face tokenizer.json: {str(error)[:200]}"
            ) from error
        # A saved truncation would silently cut every document short.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        template = self._tokenizer.encode("").ids
        known = [vocab[name] for name in _BEGINNINGS if name in vocab]
        if not template and not known:
            raise ConfigError(
                f"data.tokenizer={path!r} has no token that begins a text: its template adds none, "
                f"and its vocabulary has none of {', '.join(_BEGINNINGS)}. Add one of these to it."
            )
        self.marker = (template or known)[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: int64 [num_tokens]."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without markers and other special tokens."""
        return self._tokenizer.decode([int(i) for i in ids if i != self.marker])


class SentencePieceTokenizer:
    """A SentencePiece `.model`; documents are marked by its bos id, else its eos id."""

    def __init__(self, path: str):
        data = _read(path)
        self.fingerprint = "sentencepiece:" + hashlib.blake2b(data, digest_size=16).hexdigest()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ConfigError(
                f"data.tokenizer={path!r} is not a SentencePiece model: {str(error)[:200]}"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        # Either id is -1 in a model trained without that token.
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.marker = bos if bos >= 0 else eos
        if self.marker < 0:
            raise ConfigError(
                f"data.tokenizer={path!r} has neither a bos nor an eos token to mark documents with"
            )

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: int64 [num_tokens]."""
        return [np.array(ids, np.int64) for ids in self._processor.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without markers and other control tokens."""
        return self._processor.decode([int(i) for i in ids if i != self.marker])


_BY_SUFFIX = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Args:
      path: `bytes`, or the path of a `tokenizer.json` or of a SentencePiece `.model`.

    Raises:
      ConfigError: it is none of these, cannot be read, or has no token to mark documents with.
    """
    if path == "bytes":
        return ByteTokenizer()
    if (suffix := Path(path).suffix) not in _BY_SUFFIX:
        raise ConfigError(
            f"data.tokenizer={path!r}: expected 'bytes', or the path of a tokenizer.json "
            "(Hugging Face) or .model (SentencePiece) file"
        )
    return _BY_SUFFIX[suffix](path)


def _read(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"data.tokenizer={path!r} cannot be read: {error.strerror}") from error
