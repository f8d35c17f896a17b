"""Tokens per second of the trainer's whole loop against other trainers of the same model.

    make bench                                           # S and M, three rounds, all peers
    python scripts/bench.py --shapes=S --rounds=5 --peers=bare_jax,torch_compile

Before anything is timed, all train from the same weights on the same batches, and their losses
must agree. Then each starts in a process of its own, and once it has done `WARM_STEPS` it is held;
they go on in turns, `WARM_STEPS` steps each, and the rate is that of these: all that happens in
them counts (data, logging, a checkpoint of the trainer's), compilation does not. So many are in
memory at once as --at_once says; each such group has the trainer, to which it is compared.

Writes bench.json, bench.md and bench.svg below --out. Peers are in scripts/peers/, each in a venv
that `make bench-peers` makes; one that cannot be imported is named in the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import platform
import shutil
import signal
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import bench_report
import jax
import numpy as np
from bench_peers import PEERS, Job, Run, version_of

from spmd_train import experiment
from spmd_train.config import parse, to_json
from spmd_train.parallel.rules import leaf_path

WARM_STEPS = 5
LOSS_TOLERANCE = 2e-6
"""Largest relative difference of two losses in the first steps: float32 noise."""


class Shape(NamedTuple):
    """A model, its batch, and how many steps of it are timed: a multiple of `WARM_STEPS`."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    sequence_length: int
    batch_size: int
    timed_steps: int


SHAPES = {
    "S": Shape(4, 256, 4, 688, sequence_length=256, batch_size=16, timed_steps=40),
    "M": Shape(6, 512, 8, 1376, sequence_length=512, batch_size=8, timed_steps=15),
}


def make_problem(
    folder: pathlib.Path, shape: Shape, *, num_steps: int, data: Mapping[str, Any] | None = None
) -> None:
    """Writes what all train: config.json, weights.npz, batches.npz.

    Args:
        folder: made.
        shape: the model and its batch.
        num_steps: how many batches.
        data: keys of the config's `data`; default: the standard library as one long document, so
            that plain causal attention, which every peer has a fast way for, is all there is.
    """
    folder.mkdir(parents=True)
    if data is None:
        sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
        (folder / "train.txt").write_bytes(b"".join(path.read_bytes() for path in sources))
        (folder / "eval.txt").write_bytes(sources[0].read_bytes())
        paths = {"path": f"{folder}/train.txt", "eval_path": f"{folder}/eval.txt"}
        data = {"source": "text", **paths}
    config = parse(
        {
            "model": {
                "num_layers": shape.num_layers,
                "embed_dim": shape.embed_dim,
                "num_heads": shape.num_heads,
                "mlp_dim": shape.mlp_dim,
                "vocab_size": 256,
                "scan_unroll": shape.num_layers,
            },
            "data": {"sequence_length": shape.sequence_length, **data},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"name": "constant"}},
            "train": {"global_batch_size": shape.batch_size, "eval_every": 0},
        }
    )
    program = experiment.build(config).program
    leaves = jax.tree_util.tree_flatten_with_path(program.init(config.train.seed).params)[0]
    dataset = experiment.open_data(config, split="train")
    batches = [dataset.batch(step, global_batch_size=shape.batch_size) for step in range(num_steps)]
    names = ("tokens", "targets", "segment_ids", "positions", "weights")
    (folder / "config.json").write_text(to_json(config))
    np.savez(folder / "weights.npz", **{leaf_path(path): np.asarray(w) for path, w in leaves})
    np.savez(folder / "batches.npz", **{n: np.stack([b[n] for b in batches]) for n in names})


def check_losses(
    problem: pathlib.Path, folder: pathlib.Path, *, num_steps: int, peers: Iterable[str]
) -> float:
    """Trains a few steps with each peer.

    Returns:
        The largest relative difference of a peer's losses to the trainer's.

    Raises:
        SystemExit: it is more than float32 noise.
    """

    def losses_of(name: str) -> np.ndarray:
        run = Run(name, Job(problem, folder / name, num_steps, log_every=1))
        run.end()
        return np.array([run.records[step].loss for step in range(1, num_steps + 1)])

    ours, largest = losses_of("trainer"), 0.0
    for name in peers:
        theirs = ours if name == "trainer" else losses_of(name)
        difference = float(np.max(np.abs(ours - theirs) / theirs))
        if not difference <= LOSS_TOLERANCE:
            raise SystemExit(f"not the same math: {ours}, {name} {theirs}; nothing was timed")
        largest = max(largest, difference)
    return largest


def time_peers(
    problem: pathlib.Path,
    folder: pathlib.Path,
    shape: Shape,
    *,
    peers: Iterable[str],
) -> dict[str, dict[str, float]]:
    """Runs the peers at once, but one at a time: a few steps each while the others are held.

    So what else the machine does, and how fast it is this minute, is the same for all.

    Args:
        problem: what they train.
        folder: for their runs.
        shape: the problem's.
        peers: the trainer among them.

    Returns:
        Of each peer `tokens_per_second`, `cpu_seconds_per_step`, and `trainer_over`: the trainer's
        tokens per second over its.
    """
    last = WARM_STEPS + shape.timed_steps
    runs: dict[str, Run] = {}
    try:
        for peer in peers:
            save_at = WARM_STEPS + shape.timed_steps // 2
            job = Job(problem, folder / peer, last, WARM_STEPS, save_at)
            runs[peer] = Run(peer, job)
            runs[peer].until(WARM_STEPS)
            runs[peer].hold()
        for step in range(2 * WARM_STEPS, last + 1, WARM_STEPS):
            for run in runs.values():
                run.go_on()
                run.until(step)
                run.hold()
    finally:
        for run in runs.values():
            run.kill()

    def taken(peer: str) -> tuple[float, float]:
        begin, end = runs[peer].records[WARM_STEPS], runs[peer].records[last]
        return end.seconds - begin.seconds, end.cpu_seconds - begin.cpu_seconds

    tokens = shape.timed_steps * shape.batch_size * shape.sequence_length
    return {
        peer: {
            "tokens_per_second": tokens / taken(peer)[0],
            "cpu_seconds_per_step": taken(peer)[1] / shape.timed_steps,
            "trainer_over": taken(peer)[0] / taken(bench_report.BASE)[0],
        }
        for peer in runs
    }


def time_rounds(
    problem: pathlib.Path,
    folder: pathlib.Path,
    shape: Shape,
    *,
    rounds: int,
    at_once: int,
    peers: Iterable[str],
) -> dict[str, list[dict[str, float]]]:
    """Times the peers in groups that have room in memory, with the trainer in each.

    Args:
        problem: what they train.
        folder: for their runs.
        shape: the problem's.
        rounds: how often all are timed.
        at_once: how many are in memory.
        peers: the trainer among them.

    Returns:
        Peer to what `time_peers` tells of it, an entry for each time; the trainer's: one for each
        group and round.
    """
    results: dict[str, list[dict[str, float]]] = {peer: [] for peer in peers}
    others = [peer for peer in results if peer != bench_report.BASE]
    num_groups = max(1, -(-len(others) // (at_once - 1)))
    for number in range(rounds):
        for group in range(num_groups):
            together = [bench_report.BASE, *others[group::num_groups]]
            for peer, told in time_peers(problem, folder, shape, peers=together).items():
                results[peer].append(told)
                print(f"round {number + 1}/{rounds} {peer}: {told}", file=sys.stderr)
    return results


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "date": f"{datetime.date.today()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "vectors": next((f for f in ("avx512f", "avx2") if f in flags), platform.machine()),
        "load before": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="S,M", help="of " + ", ".join(SHAPES))
    parser.add_argument("--peers", default="all", help="all, or of " + ", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--at_once", type=int, default=5, help="in memory, of 24 GB; at least 2")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    parser.add_argument("--table", type=pathlib.Path, help="a page whose section is written anew")
    args = parser.parse_args()
    if args.at_once < 2:
        parser.error(f"--at_once = {args.at_once}: at least 2, the trainer and another")
    # Peers have sessions of their own: none ends, and a held one never would, but by this process.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) != signal.SIG_IGN:
            signal.signal(ending, lambda number, _: sys.exit(128 + number))
    asked = PEERS if args.peers == "all" else args.peers.split(",")
    facts, missing, peers = machine(), {}, []
    for name in dict.fromkeys(["trainer", *asked]):
        try:
            facts[PEERS[name].module.split(".")[0]] = version_of(PEERS[name])
            peers.append(name)
        except ImportError as error:
            missing[name] = str(error)
    labels = {name: peer.label for name, peer in PEERS.items()}
    answer: dict[str, Any] = {"machine": facts, "labels": labels, "missing": missing}
    answer |= {"num_rounds": args.rounds, "shapes": {}}
    for name in args.shapes.split(","):
        shape, folder = SHAPES[name], args.out.resolve() / name
        shutil.rmtree(folder, ignore_errors=True)
        problem = folder / "problem"
        make_problem(problem, shape, num_steps=WARM_STEPS + shape.timed_steps)
        difference = check_losses(problem, folder, num_steps=5, peers=peers)
        rounds = time_rounds(
            problem, folder, shape, rounds=args.rounds, at_once=args.at_once, peers=peers
        )
        answer["shapes"][name] = {
            "peers": bench_report.summarize(rounds),
            "rounds": rounds,
            "loss_difference": difference,
        }
    (args.out / "bench.json").write_text(json.dumps(answer, indent=2) + "\n")
    (args.out / "bench.md").write_text(bench_report.markdown(answer))
    (args.out / "bench.svg").write_text(bench_report.plot(answer))
    print(bench_report.markdown(answer), end="")
    if args.table:
        bench_report.write_page(args.table, answer)


if __name__ == "__main__":
    main()
