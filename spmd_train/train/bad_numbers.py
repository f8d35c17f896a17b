"""Steps that must not count: a loss or gradient that is no number, or far from the usual."""

from __future__ import annotations

import collections
import json
import math
import os
import statistics
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spmd_train.config import ConfigError, TrainConfig
from spmd_train.parallel.rules import leaf_path

_WINDOW = 100
_FEWEST = 20


class BadStepError(Exception):
    """A step whose numbers are bad; the state after it must not be saved.

    Attributes:
        step: optimizer steps done, this one included.
        why: what is bad.
    """

    def __init__(self, step: int, why: str) -> None:
        super().__init__(f"step {step}: {why}")
        self.step = step
        self.why = why


class NumbersWatch:
    """Looks at each step's loss and gradient norm."""

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._norms: collections.deque[float] = collections.deque(maxlen=_WINDOW)
        self._in_a_row = 0

    def check(self, step: int, *, loss: float, grad_norm: float) -> None:
        """Notes a step.

        Args:
            step: optimizer steps done.
            loss: nats per token.
            grad_norm: before clipping.

        Raises:
            BadStepError: its numbers are bad, and the step was not skipped on the device or
                `train.max_bad_steps` in a row were.
        """
        why = self._fault(loss, grad_norm)
        if why is None:
            self._norms.append(grad_norm)
            self._in_a_row = 0
            return
        self._in_a_row += 1
        if self._config.bad_step != "skip":
            raise BadStepError(step, why)
        if self._in_a_row >= self._config.max_bad_steps:
            raise BadStepError(step, f"{why}, {self._in_a_row} steps in a row")

    def _fault(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the loss is {loss:g}, the gradient's norm {grad_norm:g}"
        factor = self._config.spike_factor
        if factor and len(self._norms) >= _FEWEST:
            usual = statistics.median(self._norms)
            if grad_norm > factor * usual:
                return (
                    f"the gradient's norm {grad_norm:g} is over train.spike_factor={factor:g} "
                    f"times its median of late, {usual:g}"
                )
        return None


class Rollbacks:
    """Which batches are not to be seen again: WORKDIR/rollbacks.jsonl, a line for each rollback."""

    def __init__(self, workdir: Path) -> None:
        self._path = Path(workdir) / "rollbacks.jsonl"

    def _content(self) -> bytes:
        """Whole lines: a process that was killed may have left a part of one."""
        content = self._path.read_bytes() if self._path.exists() else b""
        return content[: content.rfind(b"\n") + 1]

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._content().splitlines()]

    def skipped(self, step: int) -> int:
        """How many batches are left out after the checkpoint of a step."""
        return sum(line["skip"] for line in self._lines() if line["step"] == step)

    def count(self, step: int | None = None) -> int:
        """How many rollbacks there were, to a step or to any."""
        return sum(step is None or line["step"] == step for line in self._lines())

    def add(self, *, step: int, skip: int, bad_step: int, why: str) -> None:
        """Notes a rollback to `step` that leaves out `skip` batches; on disk when it returns."""
        line = json.dumps({"step": step, "skip": skip, "bad_step": bad_step, "why": why})
        size = len(self._content())
        with self._path.open("ab") as file:
            file.truncate(size)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def write_bundle(
    workdir: Path,
    bad: BadStepError,
    *,
    config: Mapping[str, Any],
    batch_number: int,
    batch: Mapping[str, np.ndarray],
) -> Path:
    """Writes down a bad step: WORKDIR/bad_steps/STEP/{bundle.json, batch.npz}.

    The state before it is the newest checkpoint's after some steps, which are the same whenever
    they are made again; so is the rng, a function of seed and step.

    Returns:
        The folder.
    """
    folder = Path(workdir) / "bad_steps" / str(bad.step)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "batch.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **batch)
    bundle = {"step": bad.step, "why": bad.why, "batch": batch_number, "config": dict(config)}
    (folder / "bundle.json").write_text(json.dumps(bundle, indent=1), encoding="utf-8")
    return folder


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What `write_bundle` wrote; runs no code that a stranger may have put there.

    Raises:
        ConfigError: it is no bundle.
    """
    try:
        told = json.loads((folder / "bundle.json").read_bytes())
        types = {"step": int, "why": str, "batch": int, "config": dict}
        if not isinstance(told, dict) or any(
            type(told.get(name)) is not kind for name, kind in types.items()
        ):
            raise ValueError("bundle.json must have step, why, batch and config")
        path = folder / "batch.npz"
        with zipfile.ZipFile(path) as members:
            # We compress nothing; who does may unfold to more than there is memory.
            if any(m.file_size > path.stat().st_size for m in members.infolist()):
                raise ValueError("batch.npz holds more than its own size")
        with np.load(path, allow_pickle=False) as arrays:
            batch = dict(arrays)
    except Exception as error:  # zipfile, zlib and NumPy's headers have an error each for damage.
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise ConfigError(f"{folder}: is no bundle of a bad step: {why}") from error
    return told, batch


def not_finite(tree: Any) -> list[str]:
    """Paths of arrays with a NaN or infinity; stacked layers with the first layer that has one."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        good = np.isfinite(np.asarray(leaf))
        if not good.all():
            first = int(np.nonzero(~good.reshape(good.shape[0], -1).all(axis=1))[0][0])
            found.append(f"{leaf_path(path)}[{first}]" if good.ndim > 1 else leaf_path(path))
    return found
