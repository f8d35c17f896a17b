"""What `make bench` compares is the same training: equal losses, and a difference is noticed."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import sys
import threading
import time
import xml.etree.ElementTree

import bare_jax
import bench
import bench_peers
import bench_report
import jax
import numpy as np
import pytest
from problem import one_segment, plain_params, read_batches, read_config

SCRIPTS = pathlib.Path(__file__).parent.parent / "scripts"


NUM_STEPS = 5
SHAPE = bench.Shape(
    num_layers=2,
    embed_dim=32,
    num_heads=2,
    mlp_dim=48,
    sequence_length=2 * bare_jax.QUERY_BLOCK,
    batch_size=8,
    timed_steps=1,
)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    # Short documents: several in a sequence, so that masks and positions matter.
    text = folder / "text"
    text.mkdir()
    for path in (SCRIPTS.parent / "spmd_train").rglob("*.py"):
        for number, paragraph in enumerate(path.read_text().split("\n\n")):
            name = "-".join(path.relative_to(SCRIPTS.parent).parts)
            (text / f"{name}-{number}.txt").write_text(paragraph)
    data = {"source": "text", "path": f"{text}/*.txt", "cache_dir": str(folder / "cache")}
    bench.make_problem(folder / "problem", SHAPE, num_steps=NUM_STEPS, data=data)
    return folder / "problem"


def bare_losses(problem, **changes) -> np.ndarray:
    config, batches = read_config(problem), read_batches(problem)
    config["optimizer"] |= changes
    assert not one_segment(batches)
    losses = {}
    bare_jax.train(
        config,
        dict(np.load(problem / "weights.npz")),
        batches,
        num_steps=NUM_STEPS,
        log_every=1,
        log=losses.__setitem__,
    )
    return np.array([losses[step] for step in range(1, NUM_STEPS + 1)])


@pytest.fixture(scope="module")
def losses(problem):
    return bare_losses(problem)


def test_bench_math_both_sides_have_equal_losses(problem, losses, tmp_path):
    difference = bench.check_losses(
        problem, tmp_path, num_steps=NUM_STEPS, peers=["bare_jax", "bare_step", "trainer_one"]
    )
    assert difference <= bench.LOSS_TOLERANCE
    metrics = (tmp_path / "trainer" / "metrics.jsonl").read_text().splitlines()
    trainer = [json.loads(line)["loss"] for line in metrics]
    np.testing.assert_allclose(trainer, losses, rtol=bench.LOSS_TOLERANCE)
    assert trainer[0] == pytest.approx(math.log(256), rel=0.05)
    assert trainer[-1] < trainer[0]


@pytest.mark.parametrize("change", [{"weight_decay": 0.0}, {"clip_norm": 1e-6}])
def test_bench_math_another_optimizer_is_noticed(problem, losses, change):
    changed = bare_losses(problem, **change)
    assert np.max(np.abs(changed / losses - 1)) > 2 * bench.LOSS_TOLERANCE


def write_peer(monkeypatch, tmp_path, losses, *, module="json"):
    """A peer of the interface that all have: its losses are given, its steps take no time."""
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        f"folder, losses = pathlib.Path(sys.argv[1]), {list(map(float, losses))}\n"
        "folder.mkdir()\n"
        "lines = [json.dumps({'step': step + 1, 'loss': x, 'time': time.time()}) + '\\n'\n"
        "         for step, x in enumerate(losses)]\n"
        "(folder / 'metrics.jsonl').write_text(''.join(lines))\n"
    )
    peer = bench_peers.Peer("Other", lambda job: [str(script), str(job.workdir)], module)
    monkeypatch.setitem(bench_peers.PEERS, "other", peer)
    return peer


def test_bench_math_a_peer_of_other_math_is_refused(problem, losses, monkeypatch, tmp_path):
    write_peer(monkeypatch, tmp_path, losses)
    given = {"num_steps": NUM_STEPS, "peers": ["other"]}
    # The trainer's side is the bare loop here: the run before has shown them to be equal.
    monkeypatch.setitem(bench_peers.PEERS, "trainer", bench_peers.PEERS["other"])
    assert bench.check_losses(problem, tmp_path / "same", **given) == 0
    changed = losses * (1 + 2 * bench.LOSS_TOLERANCE)
    (tmp_path / "changed").mkdir()
    write_peer(monkeypatch, tmp_path / "changed", changed)
    with pytest.raises(SystemExit, match="not the same math"):
        bench.check_losses(problem, tmp_path / "other", **given)


def test_bench_math_a_peer_that_fails_shows_its_log(problem, monkeypatch, tmp_path):
    write_peer(monkeypatch, tmp_path, [1.0])  # stops after one step
    with pytest.raises(SystemExit, match="other: exit 0"):
        bench_peers.Run("other", bench_peers.Job(problem, tmp_path / "run", 2, log_every=1)).end()


def test_bench_math_a_held_peer_stands_still_and_is_not_timed(monkeypatch, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        "import json, pathlib, sys, time\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "folder.mkdir()\n"
        "with (folder / 'metrics.jsonl').open('w', buffering=1) as lines:\n"
        "    for step in range(1, 11):\n"
        "        print(json.dumps({'step': step, 'loss': 1, 'time': time.time()}), file=lines)\n"
        "        time.sleep(0.05)\n"
    )
    peer = bench_peers.Peer("Other", lambda job: [str(script), str(job.workdir)], "json")
    monkeypatch.setitem(bench_peers.PEERS, "other", peer)
    run = bench_peers.Run("other", bench_peers.Job(tmp_path, tmp_path / "run", 10, log_every=1))
    metrics = tmp_path / "run" / "metrics.jsonl"
    run.until(1)
    run.hold()
    before = metrics.read_text()
    time.sleep(0.5)
    assert metrics.read_text() == before
    run.go_on()
    run.end()
    told = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
    assert run.records[1].seconds == told[0]
    assert told[9] - run.records[10].seconds >= 0.5


def test_bench_math_a_bench_that_is_told_to_end_ends_its_peers(monkeypatch, tmp_path):
    peer = bench_peers.Peer("Other", lambda job: ["-c", "import time; time.sleep(60)"], "json")
    monkeypatch.setitem(bench_peers.PEERS, "other", peer)
    run = bench_peers.Run("other", bench_peers.Job(tmp_path, tmp_path / "run", 10, log_every=1))
    before = signal.signal(signal.SIGUSR1, lambda *_: sys.exit(1))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        with pytest.raises(SystemExit):
            run.end()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run._process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", bench_peers.PEERS)
def test_bench_math_every_peer_is_handed_the_job(name, tmp_path):
    job = bench_peers.Job(tmp_path / "problem", tmp_path / "work", 7, log_every=3)
    line = " ".join(bench_peers.PEERS[name].arguments(job))
    for part in (f"{tmp_path}/problem", f"--workdir={tmp_path}/work", "num_steps=7", "log_every=3"):
        assert part in line
    scripts = [word for word in line.split() if word.endswith(".py")]
    assert all(pathlib.Path(script).exists() for script in scripts)


def test_bench_math_a_missing_peer_says_why(monkeypatch, tmp_path):
    peer = write_peer(monkeypatch, tmp_path, [], module="no_such_module")
    with pytest.raises(ImportError, match="No module named 'no_such_module'"):
        bench_peers.version_of(peer)
    assert bench_peers.version_of(bench_peers.PEERS["bare_jax"]) == jax.__version__
    nowhere = dataclasses.replace(peer, venv="nowhere")
    with pytest.raises(ImportError, match="make bench-peers"):
        bench_peers.version_of(nowhere)


def test_bench_math_plain_params_keep_every_number(problem):
    weights = dict(np.load(problem / "weights.npz"))
    params = plain_params(weights)
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == sum(w.size for w in weights.values())
    x_D = np.ones(SHAPE.embed_dim, np.float32)
    for i, layer in enumerate(params["layers"]):
        q_HK = np.einsum("d,dhk->hk", x_D, weights["blocks/attention/query/kernel"][i])
        np.testing.assert_allclose(x_D @ layer["query"], q_HK.ravel(), rtol=1e-5, atol=1e-6)


def test_bench_math_a_peer_is_compared_to_the_trainer_of_its_own_group(monkeypatch, tmp_path):
    def peer(label, module, seconds):
        script = tmp_path / f"{module}.py"
        script.write_text(
            "import json, os, pathlib, sys, time\n"
            "folder = pathlib.Path(sys.argv[1])\n"
            "folder.mkdir()\n"
            "counter = pathlib.Path(sys.argv[0]).with_suffix('.count')\n"
            "starts = int(counter.read_text()) + 1 if counter.exists() else 1\n"
            "counter.write_text(str(starts))\n"
            f"lines = [{{'step': step, 'loss': 1, 'time': 1e6 * {seconds} * step}}\n"
            "         for step in range(1, 11)]\n"
            "(folder / 'metrics.jsonl').write_text(''.join(json.dumps(x) + '\\n' for x in lines))\n"
            "time.sleep(600)\n"
        )
        return bench_peers.Peer(label, lambda job: [str(script), str(job.workdir)], module)

    # The trainer takes 1 million seconds a step at its first start, 2 at its second.
    peers = {
        "trainer": peer("Trainer", "trainer", "starts"),
        "a": peer("A", "a", 2),
        "b": peer("B", "b", 2),
    }
    monkeypatch.setattr(bench_peers, "PEERS", peers)
    shape = SHAPE._replace(timed_steps=5)
    told = bench.time_rounds(tmp_path, tmp_path, shape, rounds=1, at_once=2, peers=list(peers))
    assert [len(told[name]) for name in peers] == [2, 1, 1]
    assert told["a"][0]["trainer_over"] == pytest.approx(2, rel=1e-3)
    assert told["b"][0]["trainer_over"] == pytest.approx(1, rel=1e-3)
    # Tokens of a step, over its seconds.
    rates = [entry["tokens_per_second"] for entry in told["trainer"]]
    tokens = SHAPE.batch_size * SHAPE.sequence_length
    assert rates == pytest.approx([tokens / 1e6, tokens / 2e6], rel=1e-3)


def test_bench_math_the_table_has_ratios_first_and_what_did_not_run():
    def rounds(trainer_over, *rates):
        return [{"tokens_per_second": rate, "trainer_over": trainer_over} for rate in rates]

    # The machine got slower and slower: within each round the trainer was the faster by a tenth.
    results = {"trainer": rounds(1.0, 110, 55, 22), "bare_jax": rounds(1.1, 100, 50, 20)}
    summary = bench_report.summarize(results)
    assert summary["trainer"]["tokens_per_second"] == {"median": 55, "min": 22, "max": 110}
    answer = {
        "machine": {"cpu": "x"},
        "labels": {name: peer.label for name, peer in bench_peers.PEERS.items()},
        "missing": {"horovod": "does not build"},
        "num_rounds": 3,
        "shapes": {"S": {"peers": summary, "rounds": results, "loss_difference": 1e-7}},
    }
    rows = bench_report.markdown(answer).splitlines()
    assert rows[2] == "| **spmd-train, 2 devices** |  | 55 (22 to 110) |"
    assert rows[3] == "| bare JAX | 1.100 (1.100 to 1.100) | 50 (20 to 100) |"
    assert rows[4].startswith("| Horovod, 2 processes | not run: does not build |")
    svg = xml.etree.ElementTree.fromstring(bench_report.plot(answer))
    bars = [float(e.get("width")) for e in svg.findall("{*}rect")[1:]]
    assert bars[0] / bars[1] == pytest.approx(1.1, rel=1e-2)
