"""The fastest layout that fits: formulas rank thousands, the compiler has the last word."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spmd_train.config import ConfigError, ExperimentConfig, MeshConfig
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.mesh import make_mesh
from spmd_train.plan.answer import Plan, chip_with, make_plan, memory_of, times_of
from spmd_train.plan.candidates import REMAT, Candidate, candidates_on, mesh_config, meshes
from spmd_train.plan.compiled import DoesNotFitError, compile_step
from spmd_train.plan.estimate import Estimate, estimate, plans_on, shard_axes
from spmd_train.plan.network import Span, span_of
from spmd_train.plan.search_table import Row, SearchResult
from spmd_train.plan.targets import Target
from spmd_train.plan.trace_cost import TraceCost, trace_cost

log = logging.getLogger(__name__)

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
    host_bandwidth=4e9,
)


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

    Axes other than pipeline, data, fsdp and tensor stay as the config has them.

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
    if config.model.remat == "names":
        raise ConfigError(
            f"--search: model.remat = names: it chooses among {', '.join(REMAT)} itself; set it to "
            "one of them, and model.remat_saved and model.remat_offloaded to nothing"
        )
    _, usable = memory_of(config.plan, target)
    program, traces = _traces(config, devices=devices, build=build)
    ranked, too_large = [], 0
    for mesh, dcn in meshes(config, target, num_devices=len(devices)):
        try:
            plans = plans_on(program, config, mesh)
        except ConfigError:
            continue
        shards = shard_axes(config, mesh)
        spans = _spans(mesh, dcn, shards=shards, devices=devices, target=target)
        if spans is None:
            continue
        for candidate in candidates_on(config, mesh, dcn):
            found = estimate(
                candidate,
                config,
                plans=plans,
                traces=traces,
                chip=chip,
                spans=spans,
                shared_cores=target.platform == "cpu",
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
    winner = min(compiled, key=_seconds, default=None)
    rest = [row for row in rows if row is not winner]
    if winner is not None:
        winner = dataclasses.replace(winner, verdict="the fastest that was compiled and fits")
        rest = [
            dataclasses.replace(row, verdict=f"compiled, slower: {_why_slower(row, winner)}")
            if row in compiled
            else row
            for row in rest
        ]
        rest.sort(key=lambda row: (row not in compiled, row.plan is None, row.seconds))
    return SearchResult(
        rows=tuple(([winner] if winner else []) + rest),
        winner=winner,
        ranked=tuple(ranked),
        num_too_large=too_large,
    )


def _compiled_seconds(plan: Plan, chip: Chip, mesh: Any, *, dtype: str) -> float | None:
    """The compiled program's roofline, on assumed rates where the chip's are not known."""
    if plan.roofline.step is not None:
        return plan.roofline.step
    _, times, _ = times_of(
        plan.step,
        schedule=plan.schedule,
        mesh=mesh,
        target=plan.target,
        chip=chip,
        dtype=dtype,
        host_bytes=plan.state.host,
    )
    return times.step


def _why_slower(row: Row, best: Row) -> str:
    """What takes longer than with the best."""
    parts = [_parts(row.plan), _parts(best.plan)] if row.plan and best.plan else []
    if None in parts or not parts:
        parts = [row.estimate.parts, best.estimate.parts]
    own, its = (part or {} for part in parts)
    worst = max(own, key=lambda name: own[name] - its[name])
    if own[worst] <= its[worst]:
        return f"bound by {row.estimate.bound}"
    if worst == "bubble":
        return f"bubble: a stage waits {row.estimate.bubble_share:.0%} of the time"
    if not its[worst]:
        return f"{worst}: the best has none"
    return f"{worst}: {own[worst] / its[worst]:.3g} times the best's"


def _parts(plan: Plan) -> dict[str, float] | None:
    times = plan.roofline
    parts = {
        "compute": times.compute,
        "hbm": times.hbm,
        "ici": times.ici,
        "dcn": times.dcn,
        "bubble": times.bubble,
        "host": times.host,
    }
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    return known if len(known) == len(parts) else None


def _traces(
    config: ExperimentConfig, *, devices: Sequence[Any], build: Callable[..., Any]
) -> tuple[Any, dict[str, TraceCost]]:
    """The program on one device, and what it costs under each remat policy."""
    program, costs = None, {}
    for remat in REMAT:
        alone = dataclasses.replace(
            config,
            mesh=MeshConfig(data=1),
            model=dataclasses.replace(config.model, remat=remat),
            train=dataclasses.replace(config.train, grad_accumulation=1),
        )
        program = build(alone, devices=list(devices)[:1]).program
        costs[remat] = trace_cost(
            program,
            embed_dim=config.model.embed_dim,
            num_layers=config.model.num_layers,
        )
    return program, costs


def _spans(
    mesh: Mapping[str, int],
    dcn: Mapping[str, int],
    *,
    shards: tuple[str, ...],
    devices: Sequence[Any],
    target: Target,
) -> dict[tuple[str, ...], Span] | None:
    """The wires of the groups that the formulas know; None if the devices cannot lie so."""
    try:
        laid = make_mesh(mesh_config(mesh, dcn), devices=devices)
    except (ConfigError, NotImplementedError):
        return None
    copies = tuple(a for a in ("replica", "data") if mesh[a] > 1)
    groups = [("tensor",), ("pipeline",), *(axes for axes in (shards, copies) if axes)]
    return {axes: span_of(axes, mesh=laid, target=target) for axes in groups}


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
    tried: list[Any] = []
    broken: list[Any] = []
    worth = ranked[: len(ranked) - too_large]
    fitting = 0
    for candidate, found in worth:
        if fitting == num_compiled or len(tried) == 2 * num_compiled:
            break
        fits = [row.candidate.key for row in rows if row.plan and row.plan.fits]
        if tried.count(candidate.key) >= 2 or candidate.key in (*broken, *fits):
            continue
        tried.append(candidate.key)
        log.info("compiling %s", candidate.name)
        plan, verdict, seconds = None, "", found.step
        try:
            own = candidate.applied_to(config)
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
            broken.append(candidate.key)
        rows.append(
            Row(candidate=candidate, estimate=found, plan=plan, seconds=seconds, verdict=verdict)
        )
    return [*rows, *_others(ranked, rows, usable=usable, most=3 * num_compiled + 6)]


def _others(
    ranked: Sequence[tuple[Candidate, Estimate]], rows: Sequence[Row], *, usable: int, most: int
) -> list[Row]:
    """The next best, and the best of each other kind: which axes, which schedule."""
    keys = {row.candidate.key for row in rows}
    kinds = {_kind(row.candidate) for row in rows}
    best = min((row for row in rows if row.plan and row.plan.fits), key=_seconds, default=None)
    others: list[Row] = []
    for candidate, found in ranked:
        near = candidate.key not in keys and len(rows) + len(others) < most
        if not near and _kind(candidate) in kinds:
            continue
        keys.add(candidate.key)
        kinds.add(_kind(candidate))
        row = Row(candidate=candidate, estimate=found, plan=None, seconds=found.step, verdict="")
        best = best or row
        verdict = (
            f"estimated slower: {_why_slower(row, best)}"
            if found.peak_bytes <= usable * _MARGIN
            else f"estimated not to fit: {found.peak_bytes:,.0f} bytes"
        )
        others.append(dataclasses.replace(row, verdict=verdict))
    return others


def _seconds(row: Row) -> float:
    return row.seconds


def _kind(candidate: Candidate) -> tuple[Any, ...]:
    axes = tuple(a for a, n in candidate.mesh.items() if n > 1)
    return axes, candidate.ticks.schedule if candidate.ticks else ""
