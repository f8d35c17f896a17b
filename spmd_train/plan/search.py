"""The fastest layout that fits: formulas rank thousands, the compiler has the last word."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spmd_train.config import MESH_AXES, ConfigError, ExperimentConfig, MeshConfig
from spmd_train.config.schema import DcnMeshConfig
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.mesh import make_mesh
from spmd_train.plan.answer import Plan, chip_with, make_plan, memory_of
from spmd_train.plan.compiled import DoesNotFitError, compile_step
from spmd_train.plan.estimate import Candidate, Estimate, estimate, plans_on
from spmd_train.plan.network import Span, network_time, span_of
from spmd_train.plan.roofline import roofline
from spmd_train.plan.targets import Target
from spmd_train.plan.trace_cost import TraceCost, trace_cost

log = logging.getLogger(__name__)

_REMAT = ("none", "projections", "dots", "full")
_SEARCHED = ("data", "fsdp", "tensor")
_MARGIN = 1.1
"""By how much the estimated memory may be wrong before a candidate is not worth compiling."""

# A CPU's rates only order the candidates; no time is told from them.
ASSUMED_CPU = Chip(
    device_kinds=("cpu",),
    flops={"float32": 2e10, "bfloat16": 1e10},
    hbm_bytes=0,
    hbm_bandwidth=4e9,
    source="assumed",
    ici_bandwidth=1e9,
    dcn_bandwidth=1e9,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the search's table.

    Attributes:
        candidate: the layout.
        estimate: by formulas.
        plan: by the compiler; None: not compiled, or it refused.
        seconds: of a step, by which rows are ordered: of the compiled program if there is one. On
            a CPU target it orders, but tells no time.
        verdict: why it won or lost.
    """

    candidate: Candidate
    estimate: Estimate
    plan: Plan | None
    seconds: float
    verdict: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found.

    Attributes:
        rows: best first; the winner is the first if there is one.
        winner: compiled, and it fits; None if none of the compiled ones does.
        num_considered: candidates whose batch and model divide.
        num_too_large: of them, those that formulas say do not fit.
    """

    rows: tuple[Row, ...]
    winner: Row | None
    num_considered: int
    num_too_large: int


def search(
    config: ExperimentConfig,
    *,
    target: Target,
    devices: Sequence[Any],
    build: Callable[..., Any],
    options: Mapping[str, Any],
    num_compiled: int = 3,
) -> SearchResult:
    """Looks for the layout with the least predicted step time that fits.

    Axes other than data, fsdp and tensor stay as the config has them.

    Args:
        config: what to lay out; the batch, and so what a step learns, stays.
        target: whose devices they are.
        devices: to lay meshes over.
        build: `experiment.build`.
        options: XLA's, to compile with.
        num_compiled: how many of the best are compiled.
    """
    dtype = config.model.compute_dtype
    chip = chip_with(config.plan, target.chip, dtype=dtype) or ASSUMED_CPU
    if dtype not in chip.flops or chip.ici_bandwidth is None:
        raise ConfigError(
            f"--search: the rates of {target.text} in {dtype} are not known; set plan.chip.flops "
            "and plan.chip.ici_bandwidth"
        )
    _, usable = memory_of(config.plan, target)
    traces = _traces(config, devices=devices, build=build)
    ranked, too_large = [], 0
    for mesh, dcn in _meshes(config, target, num_devices=len(devices)):
        try:
            plans = plans_on(traces[0], config, mesh)
        except ConfigError:
            continue
        spans = _spans(mesh, dcn, devices=devices, target=target)
        if spans is None:
            continue
        for candidate in _on_mesh(config, mesh, dcn):
            found = estimate(
                candidate,
                config,
                plans=plans,
                trace=traces[1][candidate.remat],
                chip=chip,
                spans=spans,
            )
            too_large += found.peak_bytes > usable * _MARGIN
            ranked.append((candidate, found))
    ranked.sort(key=lambda pair: (pair[1].peak_bytes > usable * _MARGIN, pair[1].step))
    rows = _judge(
        ranked,
        config,
        usable=usable,
        too_large=too_large,
        chip=chip,
        target=target,
        devices=devices,
        build=build,
        options=options,
        num_compiled=num_compiled,
    )
    compiled = [row for row in rows if row.plan is not None and row.plan.fits]
    winner = min(compiled, key=lambda row: row.seconds, default=None)
    rest = [row for row in rows if row is not winner]
    if winner is not None:
        winner = dataclasses.replace(winner, verdict="the fastest that was compiled and fits")
        rest = [
            dataclasses.replace(row, verdict=f"compiled, slower: bound by {_bound(row)}")
            if row in compiled
            else row
            for row in rest
        ]
        rest.sort(key=lambda row: (row not in compiled, row.plan is None, row.seconds))
    return SearchResult(
        rows=tuple(([winner] if winner else []) + rest),
        winner=winner,
        num_considered=len(ranked),
        num_too_large=too_large,
    )


def _compiled_seconds(plan: Plan, chip: Chip, mesh: Any, *, dtype: str) -> float | None:
    """The compiled program's roofline, on assumed rates where the chip's are not known."""
    if plan.roofline.step is not None or plan.step is None or plan.cost is None:
        return plan.roofline.step
    network = network_time(plan.step.collectives, mesh=mesh, target=plan.target, chip=chip)
    return roofline(plan.cost, network=network, chip=chip, dtype=dtype).step


def _bound(row: Row) -> str:
    return (row.plan.roofline.bound if row.plan else "") or row.estimate.bound


def _traces(
    config: ExperimentConfig, *, devices: Sequence[Any], build: Callable[..., Any]
) -> tuple[Any, dict[str, TraceCost]]:
    """The program on one device, and what it costs under each remat policy."""
    program, costs = None, {}
    for remat in _REMAT:
        alone = dataclasses.replace(
            config,
            mesh=MeshConfig(data=1),
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, grad_accumulation=1),
        )
        program = build(alone, devices=list(devices)[:1]).program
        costs[remat] = trace_cost(
            program, embed_dim=config.model.embed_dim, num_layers=config.model.num_layers
        )
    return program, costs


def _meshes(
    config: ExperimentConfig, target: Target, *, num_devices: int
) -> Iterator[tuple[dict[str, int], dict[str, int]]]:
    """Sizes of the axes, and how they lie between slices or nodes."""
    fixed = {a: getattr(config.mesh, a) for a in MESH_AXES if a not in _SEARCHED}
    fixed = {a: max(size, 1) for a, size in fixed.items()}
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
    for tensor, fsdp in itertools.product(divisors, divisors):
        if within % (tensor * fsdp):
            continue
        inner = {"data": within // (tensor * fsdp), "fsdp": fsdp, "tensor": tensor}
        for across in ("data", "fsdp") if parts > 1 else ("data",):
            sizes = {a: n * (parts if a == across else 1) for a, n in inner.items()}
            mesh = {a: sizes.get(a) or fixed[a] for a in MESH_AXES}
            yield mesh, ({across: parts} if parts > 1 else {})


def _on_mesh(
    config: ExperimentConfig, mesh: Mapping[str, int], dcn: Mapping[str, int]
) -> Iterator[Candidate]:
    shards = math.prod(mesh[a] for a in ("replica", "data", "fsdp", "expert"))
    batch = config.train.global_batch_size
    for remat, accumulation in itertools.product(_REMAT, (1, 2, 4, 8, 16, 32)):
        if batch % (accumulation * shards) == 0:
            yield Candidate(mesh=mesh, dcn=dcn, remat=remat, accumulation=accumulation)


def _mesh_config(mesh: Mapping[str, int], dcn: Mapping[str, int]) -> MeshConfig:
    within = {a: n // dcn.get(a, 1) for a, n in mesh.items()}
    return MeshConfig(**within, dcn=DcnMeshConfig(**dcn))


def _spans(
    mesh: Mapping[str, int], dcn: Mapping[str, int], *, devices: Sequence[Any], target: Target
) -> dict[tuple[str, ...], Span] | None:
    """The wires of the groups that the formulas know; None if the devices cannot lie so."""
    try:
        laid = make_mesh(_mesh_config(mesh, dcn), devices=devices)
    except (ConfigError, NotImplementedError):
        return None
    copies = tuple(a for a in ("replica", "data") if mesh[a] > 1)
    groups = [("fsdp",), ("tensor",), *([copies] if copies else [])]
    return {axes: span_of(axes, mesh=laid, target=target) for axes in groups}


def _with(config: ExperimentConfig, candidate: Candidate) -> ExperimentConfig:
    return dataclasses.replace(
        config,
        mesh=_mesh_config(candidate.mesh, candidate.dcn),
        model=dataclasses.replace(config.model, remat=candidate.remat),
        train=dataclasses.replace(config.train, grad_accumulation=candidate.accumulation),
    )


def _judge(
    ranked: Sequence[tuple[Candidate, Estimate]],
    config: ExperimentConfig,
    *,
    usable: int,
    too_large: int,
    chip: Chip,
    target: Target,
    devices: Sequence[Any],
    build: Callable[..., Any],
    options: Mapping[str, Any],
    num_compiled: int,
) -> list[Row]:
    """Compiles the best few, each mesh once, and says of others why they lose."""
    rows: list[Row] = []
    tried: list[Mapping[str, int]] = []
    broken: list[Mapping[str, int]] = []
    worth = ranked[: len(ranked) - too_large]
    fitting = 0
    for candidate, found in worth:
        if fitting == num_compiled or len(tried) == 2 * num_compiled:
            break
        if (
            tried.count(candidate.mesh) >= 2
            or candidate.mesh in broken
            or any(
                row.candidate.mesh == candidate.mesh and row.plan and row.plan.fits for row in rows
            )
        ):
            continue
        tried.append(candidate.mesh)
        log.info("compiling %s", candidate.name)
        plan, verdict, seconds = None, "", found.step
        try:
            own = _with(config, candidate)
            program = build(own, devices=devices).program
            step = compile_step(program, options=options)
            plan = make_plan(own, target=target, program=program, step=step)
            fitting += plan.fits
            known = _compiled_seconds(plan, chip, program.mesh, dtype=config.model.compute_dtype)
            seconds = found.step if known is None else known
            verdict = "" if plan.fits else f"does not fit: needs {plan.needed_bytes:,} bytes"
        except DoesNotFitError as error:
            verdict = f"does not fit: the compiler refuses it ({error.needed_bytes or '?'} bytes)"
        except ConfigError as error:
            verdict = f"impossible: {error}"
        except Exception as error:
            # A compiler's own fault must not end the search, nor be recommended.
            log.warning("%s: the compiler failed: %s", candidate.name, error)
            verdict = f"failed to compile: {str(error).splitlines()[0][:80]}"
            broken.append(candidate.mesh)
        rows.append(
            Row(candidate=candidate, estimate=found, plan=plan, seconds=seconds, verdict=verdict)
        )
    seen = [row.candidate for row in rows]
    for candidate, found in ranked:
        if len(rows) >= 3 * num_compiled + 6:
            break
        if candidate in seen or any(row.candidate.mesh == candidate.mesh for row in rows):
            continue
        small = found.peak_bytes <= usable * _MARGIN
        verdict = (
            f"estimated slower: bound by {found.bound}"
            if small
            else f"estimated not to fit: {found.peak_bytes:,.0f} bytes"
        )
        rows.append(
            Row(candidate=candidate, estimate=found, plan=None, seconds=found.step, verdict=verdict)
        )
    return rows


def format_search(result: SearchResult, *, target: Target) -> Iterator[str]:
    """The table that people read, and the winner's overrides."""
    yield (
        f"{result.num_considered:,} layouts considered by formulas, {result.num_too_large:,} of "
        "them too large; the best were compiled:"
    )
    heads = ("layout", "peak", "step", "told by", "verdict")
    lines: list[tuple[str, ...]] = [heads]
    for row in result.rows:
        peak = row.plan.needed_bytes if row.plan else row.estimate.peak_bytes
        step = None if target.chip is None else row.seconds
        lines.append(
            (
                row.candidate.name,
                f"{peak / 2**30:.2f} GiB",
                "unknown" if step is None else f"{step:.4g} s",
                "compiler" if row.plan else "formula",
                row.verdict,
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()
    if result.winner is None:
        yield "none of the compiled layouts fits: more devices, or a smaller batch"
        return
    yield ""
    yield "to use it:"
    yield " ".join(
        f"--config.{path}={value}"
        for path, value in result.winner.candidate.overrides.items()
        if not (path.startswith("mesh.dcn.") and value == 1)
    )


def search_as_json(result: SearchResult) -> list[dict[str, Any]]:
    """The table as JSON."""
    return [
        {
            "overrides": row.candidate.overrides,
            "estimate": dataclasses.asdict(row.estimate),
            "compiled": row.plan is not None,
            "fits": row.plan.fits if row.plan else None,
            "peak_bytes": row.plan.needed_bytes if row.plan else None,
            "step_seconds": row.plan.roofline.step if row.plan else None,
            "ordering_seconds": row.seconds,
            "verdict": row.verdict,
        }
        for row in result.rows
    ]
