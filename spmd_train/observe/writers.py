"""Where metrics go: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pathlib
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from spmd_train.config import ConfigError, ObserveConfig
from spmd_train.observe.jsonl import JsonlWriter

_log = logging.getLogger(__name__)


class MetricWriter(Protocol):
    """Takes the metrics of a step."""

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Writes one step's values.

        Args:
            step: the step.
            split: "train" or "eval".
            values: name to value; None where a value does not exist.
        """
        ...

    def close(self) -> None:
        """Flushes and closes."""
        ...


class TensorBoardWriter:
    """Scalars `SPLIT/NAME` as TensorBoard event files."""

    def __init__(self, folder: str | os.PathLike[str], *, resume_step: int = 0):
        """Opens a new event file.

        Args:
            folder: of the event files.
            resume_step: TensorBoard is told to hide what an earlier attempt wrote after it.
        """
        purge_step = resume_step + 1 if resume_step else 0
        self._writer = SummaryWriter(os.fspath(folder), purge_step=purge_step, flush_secs=10)

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """See `MetricWriter`."""
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"{split}/{name}", float(value), step)

    def close(self) -> None:
        """See `MetricWriter`."""
        self._writer.close()


class WandbWriter:
    """Scalars `SPLIT/NAME` as a Weights & Biases run; a resumed run goes on in the same one."""

    def __init__(
        self,
        project: str,
        *,
        workdir: str | os.PathLike[str],
        resume_step: int = 0,
        run_config: Mapping[str, Any],
    ):
        """Begins the run, or goes on with the one whose id is in `WORKDIR/wandb_id`.

        Args:
            project: its project.
            workdir: of the run.
            resume_step: the restored step; 0 begins a new run.
            run_config: shown beside the metrics.

        Raises:
            ConfigError: wandb is not installed.
        """
        wandb = _import_wandb(project)
        folder = pathlib.Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "wandb_id"
        if not (resume_step and id_file.exists()):
            id_file.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            id=id_file.read_text().strip(),
            resume="allow",
            dir=os.fspath(folder),
            config=dict(run_config),
        )
        # wandb's own step must not go back, which ours does on a restart: ours is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """See `MetricWriter`."""
        scalars = {f"{split}/{k}": float(v) for k, v in values.items() if v is not None}
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        """See `MetricWriter`."""
        self._run.finish()


class Writers:
    """Several writers as one; a context manager that closes them."""

    def __init__(self, writers: Sequence[MetricWriter]):
        """Takes over the writers; without any it writes nothing."""
        self._writers = tuple(writers)

    def write(self, step: int, split: str, values: Mapping[str, float | None]) -> None:
        """Writes to each; where that fails (a full disk) it warns, and training goes on."""
        for writer in self._writers:
            try:
                writer.write(step, split, values)
            except OSError as error:
                _log.warning("the metrics of step %d could not be written: %s", step, error)

    def close(self) -> None:
        """Closes all of them, even if one fails."""
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.callback(writer.close)

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _import_wandb(project: str) -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ConfigError(
            f"observe.wandb_project = {project!r} needs the package wandb: "
            "pip install 'spmd-train[wandb]', or leave it empty"
        ) from error


def check_writers(config: ObserveConfig) -> None:
    """Refuses what `make_writers` would refuse.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed.
    """
    if config.wandb_project:
        _import_wandb(config.wandb_project)


def make_writers(
    config: ObserveConfig,
    *,
    workdir: str | os.PathLike[str],
    resume_step: int = 0,
    run_config: Mapping[str, Any],
) -> Writers:
    """The writers that the config asks for.

    For one process of the run; the others use `Writers(())`.

    Args:
        config: observe's.
        workdir: of the run.
        resume_step: the restored step; 0 if nothing was restored.
        run_config: the whole config as JSON-able dicts.

    Returns:
        One writer for all.

    Raises:
        ConfigError: Weights & Biases is asked for and not installed; nothing was written.
    """
    folder = pathlib.Path(workdir)
    writers: list[MetricWriter] = []
    if config.wandb_project:  # first: it is the one that can be refused
        writers.append(
            WandbWriter(
                config.wandb_project,
                workdir=folder,
                resume_step=resume_step,
                run_config=run_config,
            )
        )
    writers.append(JsonlWriter(folder / "metrics.jsonl", resume_step=resume_step))
    if config.tensorboard:
        writers.append(TensorBoardWriter(folder / "tensorboard", resume_step=resume_step))
    return Writers(writers)
