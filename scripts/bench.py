"""Tokens per second of the trainer's whole loop against a bare JAX loop of the same math.

    make bench                                # S and M, three rounds
    python scripts/bench.py --shapes=S --rounds=5

Before anything is timed, both train from the same weights on the same batches, and their losses
must agree. Then the two run in turn, each time in a process of its own, and the rate is that of the
steps after the first `WARM_STEPS`: all that happens in them counts (data, logging, a checkpoint of
the trainer's), compilation does not. Prints a Markdown table; writes it, and JSON, below --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from spmd_train import cluster, experiment
from spmd_train.config import parse, to_json
from spmd_train.parallel.rules import leaf_path

ROOT = pathlib.Path(__file__).resolve().parent.parent
WARM_STEPS = 10
LOSS_TOLERANCE = 2e-6
"""Largest relative difference of two losses in the first steps: float32 noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, its batch, and how many steps of it are timed."""

    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    sequence_length: int
    batch_size: int
    timed_steps: int


SHAPES = {
    "S": Shape(
        num_layers=4,
        embed_dim=256,
        num_heads=4,
        mlp_dim=688,
        sequence_length=256,
        batch_size=16,
        timed_steps=30,
    ),
    "M": Shape(
        num_layers=6,
        embed_dim=512,
        num_heads=8,
        mlp_dim=1376,
        sequence_length=512,
        batch_size=8,
        timed_steps=20,
    ),
}


def make_problem(
    folder: pathlib.Path, shape: Shape, *, num_steps: int, data: Mapping[str, Any] | None = None
) -> None:
    """Writes what both sides train: config.json, weights.npz, batches.npz.

    Args:
        folder: made.
        shape: the model and its batch.
        num_steps: how many batches.
        data: keys of the config's `data`; default: the standard library, as bytes.
    """
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
            "data": {"sequence_length": shape.sequence_length, **(data or {})},
            "optimizer": {"learning_rate": 1e-3, "schedule": {"name": "constant"}},
            "train": {"global_batch_size": shape.batch_size, "eval_every": 0},
        }
    )
    program = experiment.build(config).program
    leaves = jax.tree_util.tree_flatten_with_path(program.init(config.train.seed).params)[0]
    dataset = experiment.open_data(config, split="train")
    batches = [dataset.batch(step, global_batch_size=shape.batch_size) for step in range(num_steps)]
    names = ("tokens", "targets", "segment_ids", "positions", "weights")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    np.savez(folder / "weights.npz", **{leaf_path(path): np.asarray(w) for path, w in leaves})
    np.savez(folder / "batches.npz", **{n: np.stack([b[n] for b in batches]) for n in names})


PEERS = {
    "trainer": lambda problem, workdir, num_steps, log_every, checkpoint_every: [
        *("-m", "spmd_train", "train", f"--config={problem / 'config.json'}"),
        *(f"--workdir={workdir}", f"--config.train.num_steps={num_steps}"),
        f"--config.train.log_every={log_every}",
        f"--config.train.checkpoint_every={checkpoint_every}",
    ],
    "bare_jax": lambda problem, workdir, num_steps, log_every, checkpoint_every: [
        *(str(ROOT / "scripts" / "bare_jax.py"), str(problem), f"--workdir={workdir}"),
        *(f"--num_steps={num_steps}", f"--log_every={log_every}"),
    ],
}
"""Name to Python's arguments. Each writes WORKDIR/metrics.jsonl with `step`, `loss` and `time`."""


@dataclasses.dataclass(frozen=True)
class Record:
    """A step of a run: its loss, when it was known, and the process's CPU time by then."""

    loss: float
    time: float
    cpu_seconds: float


def run(
    peer: str,
    problem: pathlib.Path,
    workdir: pathlib.Path,
    *,
    num_steps: int,
    log_every: int,
    checkpoint_every: int = 0,
) -> dict[int, Record]:
    """Runs a peer in a process of its own.

    Returns:
        Logged step to record.
    """
    shutil.rmtree(workdir, ignore_errors=True)
    arguments = PEERS[peer](problem, workdir, num_steps, log_every, checkpoint_every)
    flags = [f"--{name}={value}" for name, value in cluster.CPU_FLAGS.items()]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip(),
        "JAX_COMPILATION_CACHE_DIR": str(cluster.cache_home() / "xla"),
    }
    workdir.parent.mkdir(parents=True, exist_ok=True)
    log_path = workdir.with_suffix(".log")
    records: dict[int, Record] = {}
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], env=environment, stdout=log, stderr=log
        )
        while True:
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            cpu_seconds = usage.ru_utime + usage.ru_stime if ended else _cpu_seconds(process.pid)
            for line in _lines(workdir / "metrics.jsonl")[len(records) :]:
                values = json.loads(line)
                records[values["step"]] = Record(values["loss"], values["time"], cpu_seconds)
            if ended:
                break
            time.sleep(0.05)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{peer}: exit {process.returncode}\n{log_path.read_text()[-3000:]}")
    return records


def _lines(path: pathlib.Path) -> list[str]:
    """The finished lines of a file that is being written."""
    return path.read_text().split("\n")[:-1] if path.exists() else []


def _cpu_seconds(pid: int) -> float:
    """User and system time of a running process; not a number where there is no /proc."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def check_losses(problem: pathlib.Path, folder: pathlib.Path, *, num_steps: int) -> float:
    """Trains a few steps with each peer.

    Returns:
        The largest relative difference between their losses.

    Raises:
        SystemExit: it is more than float32 noise.
    """
    losses = {}
    for peer in PEERS:
        records = run(peer, problem, folder / peer, num_steps=num_steps, log_every=1)
        losses[peer] = np.array([records[step].loss for step in range(1, num_steps + 1)])
    ours, theirs = losses["trainer"], losses["bare_jax"]
    difference = float(np.max(np.abs(ours - theirs) / theirs))
    if not difference <= LOSS_TOLERANCE:
        raise SystemExit(f"not the same math: losses {ours} and {theirs}; nothing was timed")
    return difference


def time_peers(
    problem: pathlib.Path, folder: pathlib.Path, shape: Shape, *, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Runs the peers in turn.

    Returns:
        Peer to a list, a round an entry: `tokens_per_second` and `cpu_seconds_per_step`.
    """
    last = WARM_STEPS + shape.timed_steps
    results: dict[str, list[dict[str, float]]] = {peer: [] for peer in PEERS}
    for number in range(rounds):
        for peer in PEERS:
            records = run(
                peer,
                problem,
                folder / peer,
                num_steps=last,
                log_every=WARM_STEPS,
                checkpoint_every=WARM_STEPS + shape.timed_steps // 2,
            )
            begin, end = records[WARM_STEPS], records[last]
            tokens = shape.timed_steps * shape.batch_size * shape.sequence_length
            results[peer].append(
                {
                    "tokens_per_second": tokens / (end.time - begin.time),
                    "cpu_seconds_per_step": (end.cpu_seconds - begin.cpu_seconds)
                    / shape.timed_steps,
                }
            )
            print(f"round {number + 1}/{rounds} {peer}: {results[peer][-1]}", file=sys.stderr)
    return results


def summarize(results: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and spreads: of the two peers' ratio within each round, and of each peer."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    def ratios(name: str) -> list[float]:
        pairs = zip(results["trainer"], results["bare_jax"], strict=True)
        return [ours[name] / theirs[name] for ours, theirs in pairs]

    return {
        "trainer_over_bare_jax": spread(ratios("tokens_per_second")),
        "cpu_seconds_trainer_over_bare_jax": spread(ratios("cpu_seconds_per_step")),
        "peers": {
            peer: {name: spread([r[name] for r in rounds]) for name in rounds[0]}
            for peer, rounds in results.items()
        },
        "rounds": dict(results),
    }


def markdown(answer: Mapping[str, Any]) -> str:
    """The table: ratios first."""

    def cell(spread: Mapping[str, float], digits: int) -> str:
        median, low, high = (f"{spread[n]:,.{digits}f}" for n in ("median", "min", "max"))
        return f"{median} ({low} to {high})"

    lines = [
        "| model | trainer / bare JAX, tokens/s | trainer / bare JAX, CPU time | trainer, tokens/s "
        "| bare JAX, tokens/s | largest loss difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, shape in answer["shapes"].items():
        rates = [shape["peers"][peer]["tokens_per_second"] for peer in PEERS]
        cells = [
            name,
            cell(shape["trainer_over_bare_jax"], 3),
            cell(shape["cpu_seconds_trainer_over_bare_jax"], 3),
            *(cell(rate, 0) for rate in rates),
            f"{shape['loss_difference']:.1e}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(f"{name} {value}" for name, value in answer["machine"].items())
    return "\n".join([*lines, "", f"Median (lowest to highest). {told}."]) + "\n"


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": f"{datetime.date.today()}",
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", default="S,M", help="of " + ", ".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/bench"))
    args = parser.parse_args()
    answer: dict[str, Any] = {"machine": machine(), "shapes": {}}
    for name in args.shapes.split(","):
        shape, folder = SHAPES[name], args.out.resolve() / name
        shutil.rmtree(folder, ignore_errors=True)
        make_problem(folder / "problem", shape, num_steps=WARM_STEPS + shape.timed_steps)
        difference = check_losses(folder / "problem", folder, num_steps=5)
        results = time_peers(folder / "problem", folder, shape, rounds=args.rounds)
        answer["shapes"][name] = summarize(results) | {"loss_difference": difference}
    (args.out / "bench.json").write_text(json.dumps(answer, indent=2) + "\n")
    (args.out / "bench.md").write_text(markdown(answer))
    print(markdown(answer), end="")


if __name__ == "__main__":
    main()
