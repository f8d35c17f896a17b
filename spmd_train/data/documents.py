"""The documents in the files of a source.

Every reader streams: memory is bounded by the longest record, or by `PIECE_CHARS` of a text file,
whatever the size of the corpus.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from spmd_train.config import ConfigError
from spmd_train.data.files import Files

PIECE_CHARS = 1 << 18
"""A longer text file is tokenized in pieces of about this many characters, cut after a line.

A tokenizer that looks across lines sees a difference there; bounded memory is worth it.
"""

_MAX_LINE_CHARS = 1 << 16

Keep = Callable[[str], bool]
"""Whether the document of this identity belongs to the wanted split."""


def read_documents(files: Files, *, text_key: str, keep: Keep) -> Iterator[tuple[str, bool]]:
    """Streams the non-empty documents of a split.

    A file of `text` or `stdlib` is a document, known by its name. A record of the other kinds is a
    document, known by its position and its text.

    Yields:
      `(text, begins)`: a piece of a document, and whether it is its first.

    Raises:
      ConfigError: a file does not hold what the config says, or a library is missing.
    """
    if files.kind in ("text", "stdlib"):
        yield from _text_pieces(files, keep)
        return
    for where, value in _RECORDS[files.kind](files, text_key):
        if not isinstance(value, str | bytes):
            raise ConfigError(
                f"{where} of {files.where}: field {text_key!r} holds {value!r:.40}, not text. Set "
                "text_key to the field that does"
            )
        # JSON can spell lone surrogates, which no tokenizer takes.
        data = value if isinstance(value, bytes) else value.encode(errors="replace")
        text = data.decode(errors="replace")
        if text and keep(f"{where}\n{text}"):
            yield text, True


def _text_pieces(files: Files, keep: Keep) -> Iterator[tuple[str, bool]]:
    for name, path in files.names():
        if not keep(name):
            continue
        # newline="" keeps line ends as they are.
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            begins = True
            while piece := file.read(PIECE_CHARS):
                if len(piece) == PIECE_CHARS:
                    piece += file.readline(_MAX_LINE_CHARS)
                yield piece, begins
                begins = False


def _jsonl(files: Files, text_key: str) -> Iterator[tuple[str, Any]]:
    for name, path in files.names():
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{name}:{number}"
                    yield where, _json_field(line, text_key, where=where, files=files)


def _parquet(files: Files, text_key: str) -> Iterator[tuple[str, Any]]:
    parquet = _optional("pyarrow.parquet", files)
    for name, path in files.names():
        try:
            file = parquet.ParquetFile(path)
        except ValueError as error:  # pyarrow.ArrowInvalid
            raise ConfigError(f"{name} of {files.where} is not Parquet: {error}") from error
        with file:
            _check_field(text_key, file.schema_arrow.names, where=name, files=files)
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for value in batch.column(0).to_pylist():
                    yield f"{name}:{row}", value
                    row += 1


def _arrayrecord(files: Files, text_key: str) -> Iterator[tuple[str, Any]]:
    module = _optional("array_record.python.array_record_module", files)
    for name, path in files.names():
        reader = module.ArrayRecordReader(str(path))
        if not reader.ok():
            raise ConfigError(f"{name} of {files.where} is not an ArrayRecord file")
        with contextlib.closing(reader):
            count = reader.num_records()
            for start in range(0, count, 256):
                records = reader.read(start, min(start + 256, count))
                for index, record in enumerate(records, start):
                    where = f"{name}:{index}"
                    yield where, _record_field(record, text_key, where=where, files=files)


def _record_field(record: bytes, text_key: str, *, where: str, files: Files) -> Any:
    """The text of an ArrayRecord record: all of it, or a field of a JSON object or tf Example."""
    if not text_key:
        return record
    if record.startswith(b"{"):
        return _json_field(record, text_key, where=where, files=files)
    try:
        features = _example_features(record)
    except (IndexError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{where} of {files.where}: record {record!r:.40} is neither a JSON object nor a "
            "tf.train.Example. If records are plain text, set text_key to ''"
        ) from error
    _check_field(text_key, list(features), where=where, files=files)
    return features[text_key]


def _example_features(record: bytes) -> dict[str, bytes | None]:
    """The features of a tf.train.Example: the first value where they hold bytes, else None.

    The schema is tensorflow/core/example/{example,feature}.proto: `Example.features` is field 1,
    `Features.feature` a map (field 1, entries of key 1 and value 2), `Feature.bytes_list` field 1
    and `BytesList.value` field 1.
    """
    features: dict[str, bytes | None] = {}
    for _, message in _protobuf_fields(record):
        for _, entry in _protobuf_fields(message):
            field = dict(_protobuf_fields(entry))
            kind = dict(_protobuf_fields(field[2]))
            values = [value for _, value in _protobuf_fields(kind[1])] if 1 in kind else []
            features[field[1].decode()] = values[0] if values else None
    return features


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The length-delimited fields of a protobuf message.

    The encoding is protobuf.dev/programming-guides/encoding: each field a varint tag, here of wire
    type 2, a varint length and so many bytes.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag, length = varint(), varint()
        if tag & 7 != 2 or at + length > len(message):
            raise ValueError("not a message of length-delimited fields")
        yield tag >> 3, message[at : at + length]
        at += length


def _hf_dataset(files: Files, text_key: str) -> Iterator[tuple[str, Any]]:
    datasets = _optional("datasets", files)
    dataset = datasets.load_from_disk(str(files.root)).with_format(None)
    _check_field(text_key, dataset.column_names, where="dataset", files=files)
    row = 0
    for batch in dataset.select_columns([text_key]).iter(batch_size=1024):
        for value in batch[text_key]:
            yield f"{row}", value
            row += 1


_RECORDS: dict[str, Callable[[Files, str], Iterator[tuple[str, Any]]]] = {
    "jsonl": _jsonl,
    "parquet": _parquet,
    "arrayrecord": _arrayrecord,
    "hf_dataset": _hf_dataset,
}
"""Readers of `(position, value of text_key)`."""


def _json_field(line: bytes, text_key: str, *, where: str, files: Files) -> Any:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where} of {files.where} is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where} of {files.where} is not a JSON object: {record!r:.40}")
    _check_field(text_key, list(record), where=where, files=files)
    return record[text_key]


def _check_field(text_key: str, names: list[str], *, where: str, files: Files) -> None:
    if text_key not in names:
        raise ConfigError(
            f"{where} of {files.where} has no field {text_key!r}; it has {', '.join(names)}. Set "
            "text_key to the field that holds the text"
        )


def _optional(module: str, files: Files) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"source {files.kind!r} ({files.where}) needs {module.partition('.')[0]}: "
            "pip install 'spmd-train[data]'"
        ) from error
