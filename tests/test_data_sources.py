"""Every kind of source, from real files written by the libraries that users write them with."""

import json
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python import array_record_module
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from spmd_train.config import ConfigError
from spmd_train.config.schema import DataConfig
from spmd_train.data import documents as documents_module
from spmd_train.data import open_dataset

TEXTS = [f"document {i}: " + "naïve 日本語 🙂\r\n" * (i % 7) + "." for i in range(60)]


def write_text(folder, texts):
    for i, text in enumerate(texts):
        path = folder / f"part{i // 20}" / f"{i:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return f"{folder}/**/*.txt"


def write_jsonl(folder, texts):
    folder.mkdir(parents=True)
    for part in range(2):
        lines = [json.dumps({"id": 7, "text": text}) for text in texts[part::2]]
        (folder / f"{part}.jsonl").write_text("\n\n".join(lines) + "\n")
    return f"{folder}/*.jsonl"


def write_parquet(folder, texts):
    folder.mkdir(parents=True)
    for part in range(2):
        half = texts[part::2]
        table = pyarrow.table({"id": list(range(len(half))), "text": half})
        pyarrow.parquet.write_table(table, folder / f"{part}.parquet", row_group_size=7)
    return f"{folder}/*.parquet"


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:4")
    for record in records:
        writer.write(record)
    writer.close()
    return str(path)


def write_arrayrecord(folder, texts):
    return write_records(
        folder / "a.array_record", [json.dumps({"text": t}).encode() for t in texts]
    )


def write_hf_dataset(folder, texts):
    rows = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    rows.save_to_disk(folder, num_shards=2)
    return str(folder)


WRITERS = {
    "text": write_text,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "arrayrecord": write_arrayrecord,
    "hf_dataset": write_hf_dataset,
}


@pytest.fixture(autouse=True)
def quiet_datasets():
    datasets.disable_progress_bars()


def read(dataset):
    """The documents of a dataset's only source, decoded."""
    (stream,) = dataset.streams
    bounds = zip(stream.starts[:-1], stream.starts[1:], strict=True)
    return [dataset.tokenizer.decode(stream.tokens[low:high].tolist()) for low, high in bounds]


def config(tmp_path, **values):
    return DataConfig(cache_dir=str(tmp_path / "cache"), sequence_length=8, **values)


def open_split(tmp_path, split, **values):
    return open_dataset(config(tmp_path, **values), split=split, seed=0)


@pytest.mark.parametrize("kind", WRITERS)
def test_source_gives_each_document_to_one_split(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "files", TEXTS)
    splits = {
        split: read(open_split(tmp_path, split, source=kind, path=path, eval_fraction=0.3))
        for split in ("train", "eval")
    }
    assert sorted(splits["train"] + splits["eval"]) == sorted(TEXTS)
    assert 6 <= len(splits["eval"]) <= 30  # 18 expected; 1e-4 to fall outside


@pytest.mark.parametrize("kind", WRITERS)
def test_source_takes_evaluation_from_eval_path(kind, tmp_path):
    values = {
        "source": kind,
        "path": WRITERS[kind](tmp_path / "files", TEXTS[:40]),
        "eval_path": WRITERS[kind](tmp_path / "held_out", TEXTS[40:]),
    }
    assert sorted(read(open_split(tmp_path, "train", **values))) == sorted(TEXTS[:40])
    assert sorted(read(open_split(tmp_path, "eval", **values))) == sorted(TEXTS[40:])


def test_source_split_stays_when_files_are_added_or_moved(tmp_path):
    values = {"source": "text", "eval_fraction": 0.3}
    path = write_text(tmp_path / "files", TEXTS)
    before = set(read(open_split(tmp_path, "eval", path=path, **values)))
    (tmp_path / "files" / "000_new.txt").write_text("one more")
    added = set(read(open_split(tmp_path, "eval", path=path, **values)))
    assert added - {"one more"} == before
    moved = write_text(tmp_path / "elsewhere" / "deeper", TEXTS)
    assert set(read(open_split(tmp_path, "eval", path=moved, **values))) == before


def test_source_larger_eval_fraction_only_adds_to_evaluation(tmp_path):
    path = write_jsonl(tmp_path / "files", TEXTS)
    small, large = (
        set(read(open_split(tmp_path, "eval", source="jsonl", path=path, eval_fraction=fraction)))
        for fraction in (0.2, 0.5)
    )
    assert small < large


def test_source_stdlib_is_every_file_once(tmp_path):
    root = Path(sysconfig.get_path("stdlib"))
    train, held_out = (open_split(tmp_path, split) for split in ("train", "eval"))
    texts = {
        split: [
            stream.tokens[low + 1 : high].tobytes().decode()
            for (stream,) in [dataset.streams]
            for low, high in zip(stream.starts[:-1], stream.starts[1:], strict=True)
        ]
        for split, dataset in (("train", train), ("eval", held_out))
    }
    files = [
        path
        for path in root.rglob("*.py")
        if "site-packages" not in path.parts and "dist-packages" not in path.parts
    ]
    expected = sorted(p.read_bytes().decode(errors="replace") for p in files if p.stat().st_size)
    assert sorted(texts["train"] + texts["eval"]) == expected
    assert (root / "json" / "decoder.py").read_text() in texts["train"] + texts["eval"]
    assert 0.002 < len(texts["eval"]) / len(expected) < 0.03


def test_source_undecodable_bytes_become_replacement_characters(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 and more")
    text = read(open_split(tmp_path, "train", source="text", path=f"{tmp_path}/*.txt"))
    assert text == ["caf\N{REPLACEMENT CHARACTER} and more"]


def test_source_json_surrogates_become_question_marks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "broken \\ud83d emoji"}\n')
    values = {"source": "jsonl", "path": f"{tmp_path}/*.jsonl", "eval_path": ""}
    assert read(open_split(tmp_path, "train", **values)) == ["broken ? emoji"]


def test_source_long_file_is_one_document_read_in_pieces(tmp_path, monkeypatch):
    text = "".join(f"line {i} é\r\n" for i in range(500)) + "x" * 3000
    (tmp_path / "a.txt").write_bytes(text.encode())
    monkeypatch.setattr(documents_module, "PIECE_CHARS", 100)
    monkeypatch.setattr(documents_module, "_MAX_LINE_CHARS", 50)
    dataset = open_split(tmp_path, "train", source="text", path=str(tmp_path / "a.txt"))
    assert read(dataset) == [text]
    assert dataset.streams[0].num_bytes == len(text.encode())


def test_source_skips_empty_documents(tmp_path):
    path = write_jsonl(tmp_path / "files", ["", "something long enough", ""])
    assert read(open_split(tmp_path, "train", source="jsonl", path=path)) == [
        "something long enough"
    ]


def example_class():
    """tf.train.Example as its .proto files declare it, for protobuf's own encoder."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="e", syntax="proto3")

    def message(name, **fields):
        added = file.message_type.add(name=name)
        for number, (key, (kind, repeated, type_name)) in enumerate(fields.items(), 1):
            added.field.add(
                name=key,
                number=number,
                type=kind,
                label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
                type_name=type_name,
            )
        return added

    message("BytesList", value=(field.TYPE_BYTES, True, None))
    message("FloatList", value=(field.TYPE_FLOAT, True, None))
    message("Int64List", value=(field.TYPE_INT64, True, None))
    lists = {
        f"{name}_list": (field.TYPE_MESSAGE, False, f".e.{name.title()}List")
        for name in ("bytes", "float", "int64")
    }
    message("Feature", **lists)
    features = message("Features", feature=(field.TYPE_MESSAGE, True, ".e.Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=1)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, type_name=".e.Feature", label=1
    )
    message("Example", features=(field.TYPE_MESSAGE, False, ".e.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("e.Example"))


def test_source_arrayrecord_of_tf_examples(tmp_path):
    records = []
    for i, text in enumerate(TEXTS):
        example = example_class()()
        example.features.feature["text"].bytes_list.value.append(text.encode())
        example.features.feature["label"].int64_list.value.extend([i, 300])
        example.features.feature["score"].float_list.value.append(0.5)
        records.append(example.SerializeToString())
    path = write_records(tmp_path / "a.array_record", records)
    values = {"source": "arrayrecord", "path": path}
    texts = [read(open_split(tmp_path, s, eval_fraction=0.3, **values)) for s in ("train", "eval")]
    assert sorted(texts[0] + texts[1]) == sorted(TEXTS)
    with pytest.raises(ConfigError, match=r"has no field 'body'; it has .*label"):
        open_split(tmp_path, "train", text_key="body", **values)
    with pytest.raises(ConfigError, match="field 'label' holds None, not text"):
        open_split(tmp_path, "train", text_key="label", **values)


def test_source_arrayrecord_of_plain_text(tmp_path):
    path = write_records(tmp_path / "a.array_record", [text.encode() for text in TEXTS])
    values = {"source": "arrayrecord", "path": path}
    texts = [
        read(open_split(tmp_path, split, text_key="", eval_fraction=0.3, **values))
        for split in ("train", "eval")
    ]
    assert sorted(texts[0] + texts[1]) == sorted(TEXTS)
    with pytest.raises(ConfigError, match=r"neither a JSON object nor a tf\.train\.Example.*''"):
        open_split(tmp_path, "train", **values)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrayrecord", "hf_dataset"])
def test_source_missing_field_is_told(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "files", TEXTS)
    with pytest.raises(ConfigError, match=r"data\.path=.*has no field 'body'; it has .*text"):
        open_split(tmp_path, "train", source=kind, path=path, text_key="body")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf_dataset"])
def test_source_field_that_is_not_text_is_told(kind, tmp_path):
    path = WRITERS[kind](tmp_path / "files", TEXTS)
    with pytest.raises(ConfigError, match=r"field 'id' holds \d, not text.*text_key"):
        open_split(tmp_path, "train", source=kind, path=path, text_key="id")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrayrecord"])
def test_source_file_of_another_kind_is_told(kind, tmp_path):
    (tmp_path / "a.bin").write_text("no such thing")
    with pytest.raises(ConfigError, match=r"a\.bin(:1)? of data\.path=.* is not"):
        open_split(tmp_path, "train", source=kind, path=f"{tmp_path}/*.bin")


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("parquet", "pyarrow.parquet"),
        ("arrayrecord", "array_record.python.array_record_module"),
        ("hf_dataset", "datasets"),
    ],
)
def test_source_missing_library_is_told(kind, module, tmp_path, monkeypatch):
    path = WRITERS[kind](tmp_path / "files", TEXTS)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'spmd-train\[data\]'"):
        open_split(tmp_path, "train", source=kind, path=path)


def test_source_mistaken_paths_are_told(tmp_path):
    def told(match, **values):
        with pytest.raises(ConfigError, match=match):
            open_split(tmp_path, "train", **values)

    path = write_text(tmp_path / "files", TEXTS)
    told(r"data\.path is empty: source 'text'", source="text")
    told(r"data\.path='.*\.md' matches no file", source="text", path=f"{tmp_path}/**/*.md")
    told(r"is a folder: give a glob", source="text", path=str(tmp_path))
    told(r"data\.path='.*would not be read.*Set data\.source", path=path)
    told(r"data\.eval_path='.*' matches no", source="text", path=path, eval_path="/none/*")
    told(r"both hold .*000\.txt", source="text", path=path, eval_path=f"{tmp_path}/*/*/000.txt")
    told(r"no state\.json", source="hf_dataset", path=str(tmp_path))


def test_source_dataset_of_several_splits_is_told(tmp_path):
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(tmp_path / "d")
    with pytest.raises(ConfigError, match=r"several splits: test, train\. Name the folder of one"):
        open_split(tmp_path, "train", source="hf_dataset", path=str(tmp_path / "d"))
    assert read(
        open_split(
            tmp_path,
            "eval",
            source="hf_dataset",
            path=str(tmp_path / "d" / "train"),
            eval_path=str(tmp_path / "d" / "test"),
        )
    ) == list(TEXTS)


def test_source_empty_split_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("a single document")
    values = {"source": "text", "path": str(tmp_path / "a.txt")}
    with pytest.raises(ConfigError, match=r"data\.path=.*no document .* eval split.*eval_path"):
        open_split(tmp_path, "eval", **values)
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data\.eval_path=.*hold no text"):
        open_split(tmp_path, "eval", eval_path=str(tmp_path / "b.txt"), **values)
