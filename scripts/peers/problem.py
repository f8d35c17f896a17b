"""What every peer of the bench reads and writes; needs numpy alone, as peers have their own venvs.

A peer trains the problem that bench.py has laid into a folder (config.json, weights.npz,
batches.npz) and writes WORKDIR/metrics.jsonl: `step`, `loss`, `time` of each logged step.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

NOT_DECAYED = {"embedding", "attention_norm", "mlp_norm", "final_norm"}


def parse_arguments(description: str, **choices: list[str]) -> argparse.Namespace:
    """The flags of every peer, and those by which it chooses."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("problem", type=pathlib.Path)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--num_steps", type=int, required=True)
    parser.add_argument("--log_every", type=int, required=True)
    for name, allowed in choices.items():
        parser.add_argument(f"--{name}", choices=allowed, required=True)
    return parser.parse_args()


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """The run's config, every key."""
    return json.loads((folder / "config.json").read_text())


def read_batches(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All batches: tokens, targets, segment_ids, positions, weights, each [steps, B, T]."""
    return dict(np.load(folder / "batches.npz"))


def read_params(folder: pathlib.Path) -> dict[str, Any]:
    """The initial weights: a dict for each layer, matrices [in, out]."""
    return plain_params(dict(np.load(folder / "weights.npz")))


def plain_params(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The trainer's weights, whose layers are stacked and whose heads are dims, in plain form."""
    stacked = {name: weights[f"blocks/{name}/scale"] for name in ("attention_norm", "mlp_norm")}
    for name in ("query", "key", "value"):
        w_LDHK = weights[f"blocks/attention/{name}/kernel"]
        stacked[name] = w_LDHK.reshape(*w_LDHK.shape[:2], -1)
    out_LHKD = weights["blocks/attention/out/kernel"]
    stacked["out"] = out_LHKD.reshape(out_LHKD.shape[0], -1, out_LHKD.shape[-1])
    stacked |= {name: weights[f"blocks/mlp/{name}/kernel"] for name in ("gate", "up", "down")}
    return {
        "embedding": weights["embedding/table"],
        "layers": [{name: w[i] for name, w in stacked.items()} for i in range(len(out_LHKD))],
        "final_norm": weights["final_norm/scale"],
        "head": weights["head/kernel"],
    }


def is_logged(step: int, log_every: int) -> bool:
    """Whether a step, counted from 1, is logged."""
    return step == 1 or step % log_every == 0


def one_segment(batches: Mapping[str, np.ndarray]) -> bool:
    """Whether every sequence is of one document: plain causal attention is enough."""
    return bool((batches["segment_ids"] == 1).all())


class Log:
    """Writes WORKDIR/metrics.jsonl."""

    def __init__(self, workdir: pathlib.Path) -> None:
        workdir.mkdir(parents=True, exist_ok=True)
        self._file = (workdir / "metrics.jsonl").open("w")

    def __call__(self, step: int, loss: float) -> None:
        line = {"step": step, "split": "train", "loss": loss, "time": time.time()}
        print(json.dumps(line), file=self._file, flush=True)
