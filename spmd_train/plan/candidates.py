"""Layouts that a search may choose: meshes, remat, accumulation, pipeline schedules."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from spmd_train.config import MESH_AXES, ConfigError, ExperimentConfig, MeshConfig, with_values
from spmd_train.config.schema import DcnMeshConfig
from spmd_train.parallel.mesh import mesh_text
from spmd_train.parallel.schedule_table import Schedule
from spmd_train.parallel.schedules import SCHEDULES, make_schedule
from spmd_train.plan.targets import Target

REMAT = ("none", "projections", "dots", "full")
_SEARCHED = ("pipeline", "data", "fsdp", "tensor")
_MOST_STAGES = 32


@dataclasses.dataclass(frozen=True)
class Ticks:
    """How microbatches go through the stages of a candidate.

    Attributes:
        schedule: `pipeline.schedule`.
        num_stages: P.
        num_microbatches: M, of each accumulation part.
        num_chunks: V, virtual stages on a device.
    """

    schedule: str
    num_stages: int
    num_microbatches: int
    num_chunks: int

    @property
    def table(self) -> Schedule:
        """The schedule's table."""
        return _table(self)

    @property
    def bubble(self) -> float:
        """The part of the time in which a device waits, 0 to 1."""
        return _bubble(self)

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys to values."""
        return {
            "pipeline.schedule": self.schedule,
            "pipeline.num_microbatches": self.num_microbatches,
            "pipeline.virtual_stages": self.num_chunks,
        }


@functools.cache
def _table(ticks: Ticks) -> Schedule:
    return make_schedule(
        ticks.schedule,
        num_stages=ticks.num_stages,
        num_microbatches=ticks.num_microbatches,
        num_chunks=ticks.num_chunks,
    )


@functools.cache
def _bubble(ticks: Ticks) -> float:
    return _table(ticks).bubble()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout to try.

    Attributes:
        mesh: axis to size, slices and nodes included.
        dcn: axis to its size between slices or nodes.
        remat: `model.remat`.
        accumulation: `train.grad_accumulation`.
        ticks: how microbatches go through the stages; None: there is one stage.
    """

    mesh: Mapping[str, int]
    dcn: Mapping[str, int]
    remat: str
    accumulation: int
    ticks: Ticks | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells layouts apart where remat and microbatches do not matter."""
        schedule = self.ticks.schedule if self.ticks else ""
        return tuple(self.mesh.items()), tuple(self.dcn.items()), schedule

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys to values."""
        within = {a: n // self.dcn.get(a, 1) for a, n in self.mesh.items()}
        return {
            **{f"mesh.{axis}": size for axis, size in within.items()},
            **{f"mesh.dcn.{axis}": self.dcn.get(axis, 1) for axis in self.mesh},
            "model.remat": self.remat,
            "train.grad_accumulation": self.accumulation,
            **(self.ticks.overrides if self.ticks else {}),
        }

    @property
    def name(self) -> str:
        """Short, for tables."""
        crossing = [f"{a} {n} between" for a, n in self.dcn.items() if n > 1]
        parts = [mesh_text(self.mesh), *crossing]
        if self.ticks:
            parts.append(f"{self.ticks.schedule} of {self.ticks.num_microbatches}")
        parts.append(f"remat {self.remat}")
        return ", ".join(parts + ([f"/{self.accumulation}"] if self.accumulation > 1 else []))

    def applied_to(self, config: ExperimentConfig) -> ExperimentConfig:
        """The config with this layout."""
        return with_values(config, self.overrides)


def mesh_config(mesh: Mapping[str, int], dcn: Mapping[str, int]) -> MeshConfig:
    """The `mesh` section of a candidate."""
    within = {a: n // dcn.get(a, 1) for a, n in mesh.items()}
    return MeshConfig(**within, dcn=DcnMeshConfig(**dcn))


def meshes(
    config: ExperimentConfig, target: Target, *, num_devices: int
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Sizes of the axes, and how they lie between slices or nodes.

    Stages are even parts of the layers; axes other than pipeline, data, fsdp and tensor stay as
    the config has them.

    Raises:
        ConfigError: the config's other axes do not divide the devices.
    """
    fixed = {a: getattr(config.mesh, a) for a in MESH_AXES if a not in _SEARCHED}
    fixed = {a: max(size, 1) for a, size in fixed.items()}
    for axis in fixed:
        if (size := getattr(config.mesh.dcn, axis)) > 1:
            raise ConfigError(
                f"--search: mesh.dcn.{axis} = {size}: only data, fsdp and pipeline are laid "
                "between slices or nodes here; set it to 1, or plan without --search"
            )
    free = num_devices // math.prod(fixed.values())
    parts = target.num_slices if target.platform == "tpu" else 1
    if target.platform == "gpu":
        parts = target.shape[0]
    if free * math.prod(fixed.values()) != num_devices or free % parts:
        raise ConfigError(
            f"--search: {free * math.prod(fixed.values())} devices of {num_devices} in "
            f"{parts} slices or nodes cannot be laid out with the config's other axes {fixed}"
        )
    within = free // parts
    divisors = [n for n in range(1, within + 1) if within % n == 0]
    crossing = ("data", "fsdp", "pipeline") if parts > 1 else ("data",)
    for stages, tensor, fsdp in itertools.product(divisors, divisors, divisors):
        if within % (stages * tensor * fsdp):
            continue
        data = within // (stages * tensor * fsdp)
        inner = {"pipeline": stages, "data": data, "fsdp": fsdp, "tensor": tensor}
        for across in crossing:
            sizes = {a: n * (parts if a == across else 1) for a, n in inner.items()}
            stages_in_all = sizes["pipeline"]
            if stages_in_all > _MOST_STAGES or config.model.num_layers % stages_in_all:
                continue
            mesh = {a: sizes.get(a) or fixed[a] for a in MESH_AXES}
            yield mesh, ({across: parts} if parts > 1 else {})


def candidates_on(
    config: ExperimentConfig, mesh: Mapping[str, int], dcn: Mapping[str, int]
) -> Iterator[Candidate]:
    """Remat policies, and accumulation or, where there are stages, schedules and microbatches."""
    shards = math.prod(mesh[a] for a in ("replica", "data", "fsdp", "expert"))
    batch = config.train.global_batch_size
    if mesh["pipeline"] == 1:
        for remat, accumulation in itertools.product(REMAT, (1, 2, 4, 8, 16, 32)):
            if batch % (accumulation * shards) == 0:
                yield Candidate(mesh=mesh, dcn=dcn, remat=remat, accumulation=accumulation)
        return
    for ticks, remat in itertools.product(
        _ticks(mesh["pipeline"], batch / shards, config.model.num_layers), ("none", "full")
    ):
        yield Candidate(mesh=mesh, dcn=dcn, remat=remat, accumulation=1, ticks=ticks)


def _ticks(num_stages: int, rows: float, num_layers: int) -> Iterator[Ticks]:
    """Schedules with numbers of microbatches that the rows of a device divide into."""
    for name in SCHEDULES:
        chunks = 2 if name == "interleaved" else 1
        if num_layers % (num_stages * chunks):
            continue
        for factor in (0.5, 1, 2, 4, 8):
            count = int(num_stages * factor)
            if count and rows % count == 0:
                yield Ticks(name, num_stages, count, chunks)
