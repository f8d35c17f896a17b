import collections
import itertools
import subprocess
import sys
import threading
import time

import grain
import numpy as np
import pytest

from spmd_train.config import ConfigError
from spmd_train.config.schema import DataConfig, SourceConfig
from spmd_train.data import open_dataset

ARRAYS = ("tokens", "targets", "segment_ids", "positions", "weights")


def write(folder, lengths):
    """Documents of the given lengths; document k consists of the byte k + 1."""
    folder.mkdir()
    for k, length in enumerate(lengths):
        (folder / f"{k:03}.txt").write_bytes(bytes([k + 1]) * length)
    return f"{folder}/*.txt"


def stream_of(lengths):
    return b"".join(b"\0" + bytes([k + 1]) * n for k, n in enumerate(lengths)) + b"\0"


LENGTHS = np.random.default_rng(0).integers(1, 40, 100).tolist()
HELD_OUT = np.random.default_rng(1).integers(1, 40, 25).tolist()


@pytest.fixture
def config(tmp_path):
    return DataConfig(
        source="text",
        path=write(tmp_path / "train", LENGTHS),
        eval_path=write(tmp_path / "eval", HELD_OUT),
        cache_dir=str(tmp_path / "cache"),
        sequence_length=16,
    )


def take(iterator, count):
    """The first batches of an iterator, which is closed."""
    batches = list(itertools.islice(iterator, count))
    iterator.close()
    return batches


def stack(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_data_batch_has_the_stated_arrays(config):
    train = open_dataset(config, split="train", seed=0)
    evaluation = open_dataset(config, split="eval", seed=0)
    for batch in (
        train.batch(3, global_batch_size=6),
        *take(evaluation.epoch(global_batch_size=6), None),
    ):
        assert {name: (array.shape, array.dtype.name) for name, array in batch.items()} == {
            **{name: ((6, 16), "int32") for name in ARRAYS},
            "weights": ((6, 16), "float32"),
            "row": ((6,), "int32"),
            "example_id": ((6,), "int64"),
        }
        assert batch["row"].tolist() == list(range(6))


@pytest.mark.parametrize("global_batch_size", [1, 4, 7])
def test_data_evaluation_predicts_every_token_once(config, global_batch_size):
    evaluation = open_dataset(config, split="eval", seed=0)
    stream = stream_of(HELD_OUT)
    all_rows = stack(take(evaluation.epoch(global_batch_size=global_batch_size), None))
    real = all_rows["weights"] == 1
    assert bytes(all_rows["tokens"][real].tolist()) == stream[:-1]
    assert bytes(all_rows["targets"][real].tolist()) == stream[1:]
    assert real.sum() == evaluation.num_tokens == len(stream) - 1
    assert len(all_rows["row"]) % global_batch_size == 0
    np.testing.assert_array_equal(all_rows["weights"], real)
    for name in ("tokens", "targets", "segment_ids", "positions"):
        assert not all_rows[name][~real].any()
    ids = all_rows["example_id"]
    assert ids[: evaluation.num_sequences].tolist() == list(range(evaluation.num_sequences))
    assert (ids[evaluation.num_sequences :] == -1).all()


def test_data_segments_never_cross_documents(config):
    rows = stack(take(open_dataset(config, split="eval", seed=0).epoch(global_batch_size=4), None))
    multiple = 0
    for tokens, segments, real in zip(
        rows["tokens"], rows["segment_ids"], rows["weights"] == 1, strict=True
    ):
        if not real.any():
            continue
        assert segments[0] == 1
        # A segment holds at most one marker, in front, and one value else: one document.
        for segment in range(1, segments.max() + 1):
            inside = tokens[segments == segment]
            assert 0 not in inside[1:]
            assert len(set(inside[inside != 0].tolist())) <= 1
            assert segment == 1 or inside[0] == 0
        multiple += segments.max() > 1
        assert (np.diff(segments[real]) >= 0).all()
    assert multiple > 10


def test_data_positions_restart_with_each_segment(config):
    rows = stack(take(open_dataset(config, split="eval", seed=0).epoch(global_batch_size=4), None))
    for segments, positions in zip(rows["segment_ids"], rows["positions"], strict=True):
        for segment in set(segments.tolist()) - {0}:
            inside = positions[segments == segment]
            np.testing.assert_array_equal(inside, np.arange(len(inside)))


def test_data_targets_are_the_next_tokens_of_the_stream(config):
    train = open_dataset(config, split="train", seed=0)
    stream = stream_of(LENGTHS)
    for batch in take(train.batches(global_batch_size=8), 20):
        for row, example in enumerate(batch["example_id"].tolist()):
            start = 16 * example
            assert bytes(batch["tokens"][row].tolist()) == stream[start : start + 16]
            assert bytes(batch["targets"][row].tolist()) == stream[start + 1 : start + 17]
        assert (batch["weights"] == 1).all()
        assert (batch["segment_ids"] >= 1).all()


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_data_batch_is_the_same_read_by_more_hosts(config, num_hosts):
    train = open_dataset(config, split="train", seed=0)
    evaluation = open_dataset(config, split="eval", seed=0)
    share = 8 // num_hosts
    parts = [slice(host * share, (host + 1) * share) for host in range(num_hosts)]
    read = {
        "train": lambda rows: take(train.batches(global_batch_size=8, rows=rows), 40),
        "eval": lambda rows: take(evaluation.epoch(global_batch_size=8, rows=rows), None),
    }
    for batches in read.values():
        whole = batches(slice(None))
        hosts = [batches(part) for part in parts]
        assert {len(host) for host in hosts} == {len(whole)}
        for together, *pieces in zip(whole, *hosts, strict=True):
            assert all(len(piece["row"]) == share for piece in pieces)
            assert_same(stack(pieces), together)


def test_data_rows_may_be_any_rows(config):
    train = open_dataset(config, split="train", seed=0)
    whole = train.batch(5, global_batch_size=8)
    for rows in ([6, 1, 3], slice(1, None, 3), range(2, 4)):
        some = train.batch(5, global_batch_size=8, rows=rows)
        index = np.arange(8)[rows] if isinstance(rows, slice) else list(rows)
        assert_same(some, {name: array[index] for name, array in whole.items()})


def test_data_starts_at_any_step(config):
    train = open_dataset(config, split="train", seed=0)
    walked = take(train.batches(global_batch_size=6), 60)  # three epochs and more
    for step in (0, 1, 17, 55):
        jumped = take(train.batches(global_batch_size=6, start_step=step), 3)
        for ahead, batch in enumerate(jumped):
            assert_same(batch, walked[step + ahead])
            assert_same(batch, train.batch(step + ahead, global_batch_size=6))
    (far,) = take(train.batches(global_batch_size=6, start_step=10**12), 1)
    assert_same(far, train.batch(10**12, global_batch_size=6))


@pytest.mark.parametrize("threads", [1, 4])
def test_data_order_does_not_hang_on_threads(config, threads):
    values = {**vars(config), "num_threads": threads, "prefetch": 4}
    walked = take(open_dataset(config, split="train", seed=0).batches(global_batch_size=6), 30)
    other = open_dataset(DataConfig(**values), split="train", seed=0)
    for a, b in zip(walked, take(other.batches(global_batch_size=6), 30), strict=True):
        assert_same(a, b)


def epochs(dataset, count, *, global_batch_size=6):
    """The example ids of the first epochs."""
    steps = -(-dataset.num_sequences * count // global_batch_size)
    batches = take(dataset.batches(global_batch_size=global_batch_size), steps)
    ids = stack(batches)["example_id"][: dataset.num_sequences * count]
    return ids.reshape(count, -1).tolist()


def test_data_epoch_has_every_window_once_in_a_new_order(config):
    train = open_dataset(config, split="train", seed=0)
    assert train.num_sequences == (len(stream_of(LENGTHS)) - 1) // 16
    orders = epochs(train, 3)
    for order in orders:
        assert sorted(order) == list(range(train.num_sequences))
        assert order != sorted(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_data_seed_decides_the_order(config):
    orders = [
        epochs(open_dataset(config, split="train", seed=seed), 3) for seed in (0, 0, 1, 2, 2**40)
    ]
    assert orders[0] == orders[1]
    different = [tuple(epoch) for order in orders[1:] for epoch in order]
    assert len(set(different)) == len(different)


def test_data_order_hangs_on_batch_size_only_by_where_it_is_cut(config):
    train = open_dataset(config, split="train", seed=0)
    assert epochs(train, 2, global_batch_size=6) == epochs(train, 2, global_batch_size=5)


@pytest.fixture
def mixture(tmp_path, config):
    sources = {
        name: SourceConfig(
            source="text",
            path=write(tmp_path / name, lengths),
            eval_path=config.eval_path,
            weight=weight,
        )
        for name, lengths, weight in (
            ("small", [30] * 4, 0.5),
            ("large", [50] * 40, 1.5),
            ("medium", [20] * 20, 1.0),
        )
    }
    return DataConfig(mixture=sources, cache_dir=config.cache_dir, sequence_length=16)


def bounds_of(mixture):
    """The first example id of each source, by name, and the number of its windows."""
    low, bounds = 0, {}
    for name in sorted(mixture.mixture):
        single = vars(mixture.mixture[name])
        single = {key: value for key, value in single.items() if key != "weight"}
        alone = DataConfig(**single, cache_dir=mixture.cache_dir, sequence_length=16)
        count = open_dataset(alone, split="train", seed=0).num_sequences
        bounds[name] = (low, count)
        low += count
    return bounds


def test_data_mixture_has_the_stated_shares(mixture):
    dataset = open_dataset(mixture, split="train", seed=0)
    bounds = bounds_of(mixture)
    assert dataset.num_sequences == sum(count for _, count in bounds.values())
    ids = stack(take(dataset.batches(global_batch_size=10), 60))["example_id"]
    for upto in (30, 300, 600):
        for name, share in (("small", 1 / 6), ("large", 1 / 2), ("medium", 1 / 3)):
            low, count = bounds[name]
            drawn = np.count_nonzero((ids[:upto] >= low) & (ids[:upto] < low + count))
            assert abs(drawn - share * upto) <= 1


def test_data_mixture_shuffles_each_source_by_epochs(mixture):
    dataset = open_dataset(mixture, split="train", seed=0)
    ids = stack(take(dataset.batches(global_batch_size=10), 60))["example_id"]
    for low, count in bounds_of(mixture).values():
        own = ids[(ids >= low) & (ids < low + count)] - low
        whole = own[: len(own) // count * count].reshape(-1, count)
        assert len(whole) >= 2
        assert all(sorted(epoch) == list(range(count)) for epoch in whole.tolist())
        assert len({tuple(epoch) for epoch in whole.tolist()}) > 1


def test_data_mixture_shuffles_each_source_its_own_way(tmp_path, config):
    sources = {
        name: SourceConfig(
            source="text", path=write(tmp_path / name, [50] * 20), eval_path=config.eval_path
        )
        for name in ("one", "other")
    }
    both = DataConfig(mixture=sources, cache_dir=config.cache_dir, sequence_length=16)
    dataset = open_dataset(both, split="train", seed=0)
    (count,) = {count for _, count in bounds_of(both).values()}
    ids = dataset.batch(0, global_batch_size=2 * count)["example_id"]
    one, other = ids[ids < count], ids[ids >= count] - count
    assert sorted(one) == sorted(other) == list(range(count))
    assert one.tolist() != other.tolist()


def test_data_mixture_reads_each_example_from_its_source(mixture):
    dataset = open_dataset(mixture, split="train", seed=0)
    streams = {"small": [30] * 4, "large": [50] * 40, "medium": [20] * 20}
    bounds = bounds_of(mixture)
    for batch in take(dataset.batches(global_batch_size=10), 20):
        for row, example in enumerate(batch["example_id"].tolist()):
            name = next(n for n, (low, count) in bounds.items() if low <= example < low + count)
            start = 16 * (example - bounds[name][0])
            expected = stream_of(streams[name])[start : start + 16]
            assert bytes(batch["tokens"][row].tolist()) == expected


def test_data_mixture_is_the_same_however_it_is_spelled(mixture):
    reordered = dict(reversed(mixture.mixture.items()))
    other = DataConfig(**{**vars(mixture), "mixture": reordered})
    first, second = (
        take(open_dataset(c, split="train", seed=3).batches(global_batch_size=6), 5)
        for c in (mixture, other)
    )
    for a, b in zip(first, second, strict=True):
        assert_same(a, b)


def test_data_mixture_evaluates_the_union(mixture, tmp_path):
    sources = {
        "a": SourceConfig(source="text", path=mixture.mixture["small"].path, weight=9.0),
        "b": SourceConfig(source="text", path=mixture.mixture["large"].path),
    }
    held_out = {"a": [3, 40], "b": [25]}
    for name, lengths in held_out.items():
        path = write(tmp_path / f"held_out_{name}", lengths)
        sources[name] = SourceConfig(**{**vars(sources[name]), "eval_path": path})
    values = {**vars(mixture), "mixture": sources}
    evaluation = open_dataset(DataConfig(**values), split="eval", seed=0)
    rows = stack(take(evaluation.epoch(global_batch_size=4), None))
    real = rows["weights"] == 1
    streams = [stream_of(held_out[name]) for name in ("a", "b")]
    assert bytes(rows["targets"][real].tolist()) == streams[0][1:] + streams[1][1:]
    assert evaluation.num_tokens == sum(map(len, streams)) - 2
    assert evaluation.bytes_per_token == pytest.approx((3 + 40 + 25) / evaluation.num_tokens)


def test_data_bytes_per_token_counts_bytes_of_text(config, tmp_path):
    (tmp_path / "utf8").mkdir()
    (tmp_path / "utf8" / "a.txt").write_text("日本語" * 10)
    values = {**vars(config), "path": f"{tmp_path}/utf8/*.txt"}
    dataset = open_dataset(DataConfig(**values), split="train", seed=0)
    assert dataset.num_tokens == 91
    assert dataset.bytes_per_token == pytest.approx(90 / 91)


def test_data_training_bytes_per_token_follows_the_mixture(mixture):
    ratios = {"small": 30 / 31, "large": 50 / 51, "medium": 20 / 21}
    expected = ratios["small"] / 6 + ratios["large"] / 2 + ratios["medium"] / 3
    dataset = open_dataset(mixture, split="train", seed=0)
    assert dataset.bytes_per_token == pytest.approx(expected)


def test_data_shorter_than_a_window_is_told(config):
    values = {**vars(config), "sequence_length": len(stream_of(LENGTHS))}
    with pytest.raises(ConfigError, match=r"data\.path=.*less than one window of data\.sequence_"):
        open_dataset(DataConfig(**values), split="train", seed=0)
    exact = DataConfig(**{**values, "sequence_length": len(stream_of(LENGTHS)) - 1})
    dataset = open_dataset(exact, split="train", seed=0)
    assert dataset.num_sequences == 1
    assert dataset.batch(0, global_batch_size=2)["example_id"].tolist() == [0, 0]


def test_data_of_one_document_is_told_how_to_do_without_evaluation(tmp_path):
    (tmp_path / "one.txt").write_text("text " * 100)
    config = DataConfig(source="text", path=str(tmp_path / "one.txt"), sequence_length=8)
    with pytest.raises(ConfigError, match=r"into the eval split: whole .*train\.eval_every=0"):
        open_dataset(config, split="eval", seed=0)


def test_data_mistake_in_a_mixture_names_its_source(mixture):
    sources = dict(mixture.mixture)
    sources["large"] = SourceConfig(source="text", path="/nowhere/*.txt")
    values = {**vars(mixture), "mixture": sources}
    with pytest.raises(ConfigError, match=r"data\.mixture\.large\.path='/nowhere/\*\.txt' matches"):
        open_dataset(DataConfig(**values), split="train", seed=0)


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name.startswith("grain-prefetch")]


def wait_for_no_threads():
    deadline = time.monotonic() + 20
    while prefetch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not prefetch_threads()


@pytest.mark.parametrize("how", ["close", "drop", "end"])
def test_data_iterator_leaves_no_threads(config, how):
    assert wait_for_no_threads()
    iterator = (
        open_dataset(config, split="eval", seed=0).epoch(global_batch_size=4)
        if how == "end"
        else open_dataset(config, split="train", seed=0).batches(global_batch_size=4)
    )
    seen = sum(1 for _ in itertools.islice(iterator, None if how == "end" else 3))
    assert seen == 3 or how == "end"
    assert prefetch_threads()
    if how == "close":
        iterator.close()
        iterator.close()
    else:
        del iterator
    assert wait_for_no_threads()


def test_data_batches_are_made_ahead(config):
    values = {**vars(config), "prefetch": 3, "num_threads": 1}
    dataset = open_dataset(DataConfig(**values), split="train", seed=0)
    made = collections.Counter()
    read = type(dataset)._read

    class Counting(type(dataset)):
        def _read(self, *args):
            made["batches"] += 1
            return read(self, *args)

    iterator = Counting(**{f: getattr(dataset, f) for f in dataset.__dataclass_fields__}).batches(
        global_batch_size=4
    )
    next(iterator)
    deadline = time.monotonic() + 20
    while made["batches"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert made["batches"] == 4  # the one taken, and three ahead
    iterator.close()


def test_data_unfinished_iterator_does_not_disturb_the_exit(config):
    script = f"""
from spmd_train.config.schema import DataConfig
from spmd_train.data import open_dataset
dataset = open_dataset(DataConfig(**{vars(config)!r}), split="train", seed=0)
iterator = dataset.batches(global_batch_size=4)
for batch, _ in zip(iterator, range(3)):
    pass
print(batch["tokens"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "(4, 16)\n", "")


def test_data_iterator_is_grains(config):
    iterator = open_dataset(config, split="train", seed=0).batches(global_batch_size=4)
    assert isinstance(iterator, grain.DatasetIterator)
    iterator.close()
