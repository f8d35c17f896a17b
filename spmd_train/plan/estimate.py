"""A step's memory, wire and time from formulas: to choose what is worth compiling.

State bytes are exact (the sharding plan's own), FLOPs too (counted on the traced program). The
rest is a model of a scanned transformer under FSDP x tensor parallelism; the compiler's figures
decide in the end.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any

from spmd_train.config import ExperimentConfig
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.plan import LeafPlan, plan_params, plan_state
from spmd_train.parallel.rules import axes_of, make_rules
from spmd_train.parallel.stages import loads, make_stages
from spmd_train.plan.candidates import Candidate, Ticks
from spmd_train.plan.network import Span, seconds_of
from spmd_train.plan.roofline import host_seconds
from spmd_train.plan.sizes import StateBytes, state_bytes
from spmd_train.plan.trace_cost import TraceCost
from spmd_train.tasks import LayeredTask, make_task

_COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}

# Of the layers' parameters and gradients over fsdp, the part that is sent while matmuls run: what
# the compilers' schedules of Llama-2-7B have (docs/speed.md, Overlap). On CPUs nothing is.
_TPU_OVERLAP = {"all-gather": 0.85, "all-reduce": 0.67}
_GPU_OVERLAP = {"all-gather": 0.52}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate takes, per device and step, by formulas.

    Attributes:
        state: the train state: exact.
        peak_bytes: memory.
        flops: of matmuls.
        wire_bytes: sent.
        bubble_share: the part of the time in which a pipeline's device waits, 0 to 1: the
            schedule's, and what its head makes the last stage slower than the others.
        parts: seconds of `compute`, `hbm`, `ici`, `dcn`, `bubble` and `host`, each as if alone.
        step: seconds.
        bound: the longest of the parts.
    """

    state: StateBytes
    peak_bytes: float
    flops: float
    wire_bytes: float
    bubble_share: float
    parts: Mapping[str, float]
    step: float
    bound: str


@dataclasses.dataclass(frozen=True)
class _Sent:
    """Collectives of a step; `by_layer`: of a layer's parameters, while others compute."""

    op: str
    axes: tuple[str, ...]
    payload: float
    count: int
    by_layer: bool = False


def shard_axes(config: ExperimentConfig, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes over which parameters are gathered before they are computed with."""
    embed = make_rules(config.sharding)["embed"]
    return tuple(a for a in embed if a in ("fsdp", "context") and mesh.get(a, 1) > 1)


def plans_on(
    program: Any, config: ExperimentConfig, mesh: Mapping[str, int]
) -> dict[str, LeafPlan]:
    """The sharding plan of a program's state on another mesh, without building anything.

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    shaped: Any = types.SimpleNamespace(shape=mesh)
    rules = make_rules(config.sharding)
    params = plan_params(
        program.model.abstract_params,
        program.model.logical_axes,
        rules=rules,
        overrides=config.sharding.overrides,
        mesh=shaped,
    )
    return plan_state(
        program.abstract_state,
        params,
        rules=rules,
        mesh=shaped,
        offload=config.optimizer.offload,
    )


def estimate(
    candidate: Candidate,
    config: ExperimentConfig,
    *,
    plans: Mapping[str, LeafPlan],
    traces: Mapping[str, TraceCost],
    chip: Chip,
    spans: Mapping[tuple[str, ...], Span],
    shared_cores: bool = False,
) -> Estimate:
    """Estimates a candidate.

    Args:
        candidate: what to estimate.
        config: of the experiment; the candidate's own settings replace its.
        plans: the train state's plan on the candidate's mesh.
        traces: remat policy to the cost of the program with it, one microbatch.
        chip: rates.
        spans: mesh axes to their wires.
        shared_cores: the devices are simulated; one that waits leaves its cores to the others.
    """
    mesh, model, ticks = candidate.mesh, config.model, candidate.ticks
    trace = traces[candidate.remat]
    num_devices = math.prod(mesh.values())
    state = state_bytes(plans)
    width = _COMPUTE_BYTES[model.compute_dtype]
    tensor, stages = mesh.get("tensor", 1), mesh.get("pipeline", 1)
    split = num_devices // (tensor * stages)
    parts = candidate.accumulation * (ticks.num_microbatches if ticks else 1)
    micro = config.train.global_batch_size * config.data.sequence_length // (split * parts)
    in_compute = _gathered_bytes(plans, mesh, shard_axes(config, mesh), width)
    sent = _sent(candidate, config, gathered=in_compute, micro=micro, plans=plans)

    kept = (trace.kept_wide / (split * stages) + trace.kept_inner / num_devices) / parts
    layers = max(model.num_layers // stages, 1)
    working = micro * (4 * model.embed_dim + 4 * model.mlp_dim / tensor) * width
    logits = _logit_bytes(config, micro, tensor)
    if ticks:
        held = _held_by_stage(
            ticks, config, in_compute=in_compute, micro=micro, layers=layers, tensor=tensor
        )
    else:
        saved = candidate.remat == "none" and bool(shard_axes(config, mesh))
        held = in_compute * (saved + 3 / max(layers, 1))
    temporary = kept + held + state.gradients + working + logits
    peak_bytes = state.parameters + state.optimizer + temporary

    # A stage's backward pass makes its forward pass again, but for the last one, which made none.
    again = traces["full"].flops - traces["none"].flops if ticks else 0.0
    virtual = stages * (ticks.num_chunks if ticks else 1)
    flops = (trace.flops + again * (virtual - 1) / virtual) / num_devices
    passes = (3 if candidate.remat == "none" else 4) + (1 if ticks else 0)
    traffic = (
        passes * in_compute * parts
        + 3 * (state.parameters + state.optimizer)
        + 2 * kept * parts
        + passes * layers * working * parts
    )
    compute = flops / chip.flops[model.compute_dtype]
    moving = traffic / chip.hbm_bandwidth
    overlap = {} if shared_cores else _TPU_OVERLAP if chip.ici_links else _GPU_OVERLAP
    wire, ici, dcn, hidden, in_ticks = 0.0, 0.0, 0.0, 0.0, 0.0
    for s in sent:
        span = spans[s.axes]
        group = math.prod(mesh[a] for a in s.axes)
        inside, between = seconds_of(
            s.op, payload=s.payload, group_size=group, span=span, chip=chip
        )
        seconds = ((inside or 0.0) + (between or 0.0)) * s.count
        ici += (inside or 0.0) * s.count
        dcn += (between or 0.0) * s.count
        hidden += seconds * overlap.get(s.op, 0.0) if s.by_layer else 0.0
        in_ticks += seconds if ticks and s.axes == ("tensor",) else 0.0
        sends = 1.0 if s.op == "collective-permute" else (group - 1) / group
        wire += (2 if s.op == "all-reduce" else 1) * s.payload * sends * s.count
    share = 0.0 if ticks is None or shared_cores else _bubble_share(ticks, config)
    busy = max(compute, moving) + in_ticks
    waits = busy * share / (1 - share)
    host = host_seconds(state.host, chip=chip) or 0.0
    times = {"compute": compute, "hbm": moving, "ici": ici, "dcn": dcn, "bubble": waits}
    times["host"] = host
    return Estimate(
        state=state,
        peak_bytes=peak_bytes,
        flops=flops,
        wire_bytes=wire,
        bubble_share=share,
        parts=times,
        step=max(busy + waits, hidden) + ici + dcn - hidden - in_ticks + host,
        bound=max(times, key=lambda name: times[name]),
    )


def _bubble_share(ticks: Ticks, config: ExperimentConfig) -> float:
    """What a stage waits for its turn, and for the stage with the most work."""
    task = make_task(config)
    assert isinstance(task, LayeredTask)
    stages = make_stages(
        task.num_layers,
        num_devices=ticks.num_stages,
        num_chunks=ticks.num_chunks,
        balance=config.pipeline.balance,
        head_layers=task.head_layers,
    )
    work = loads(stages.sizes, head_layers=task.head_layers)
    by_device = [sum(work[device :: ticks.num_stages]) for device in range(ticks.num_stages)]
    even = sum(by_device) / len(by_device) / max(by_device)
    return 1 - (1 - ticks.bubble) * even


def _held_by_stage(
    ticks: Ticks,
    config: ExperimentConfig,
    *,
    in_compute: float,
    micro: int,
    layers: int,
    tensor: int,
) -> float:
    """What a stage keeps from tick to tick: weights, gradients, inputs, deferred operands."""
    model = config.model
    width = _COMPUTE_BYTES[model.compute_dtype]
    slots = ticks.table.num_input_slots
    operands = 8 * model.embed_dim + 3 * (model.embed_dim + model.mlp_dim)
    deferred = ticks.table.num_deferred_slots * layers * micro * operands / tensor * width
    # Whole over fsdp: weights in the compute dtype, float32 gradients.
    return in_compute * (1 + 4 / width) + slots * micro * model.embed_dim * width + deferred


def _gathered_bytes(
    plans: Mapping[str, LeafPlan], mesh: Mapping[str, int], shards: Sequence[str], width: int
) -> float:
    """Parameters of one tensor shard in the compute dtype: what a device computes with."""
    return sum(
        math.prod(plan.shape)
        * plan.bytes_per_device
        / plan.bytes
        * width
        * math.prod(mesh[a] for a in axes_of(plan.spec) if a in shards)
        for path, plan in plans.items()
        if path.startswith("params/")
    )


def _sent(
    candidate: Candidate,
    config: ExperimentConfig,
    *,
    gathered: float,
    micro: int,
    plans: Mapping[str, LeafPlan],
) -> list[_Sent]:
    """The collectives of a step: parameters gathered, gradients and activations summed."""
    mesh, model, ticks = candidate.mesh, config.model, candidate.ticks
    width, shards = _COMPUTE_BYTES[model.compute_dtype], shard_axes(config, candidate.mesh)
    times = candidate.accumulation * (ticks.num_microbatches if ticks else 1)
    sent = []
    if shards:
        if ticks and config.pipeline.gather == "step":
            sent.append(_Sent("all-gather", shards, gathered, 1))
            sent.append(_Sent("reduce-scatter", shards, gathered * 4 / width, 1))
        else:
            gathers = (1 if candidate.remat == "none" else 2) + (1 if ticks else 0)
            sent.append(_Sent("all-gather", shards, gathered, gathers * times, by_layer=True))
            # What compilers make of a gradient that ends up sharded: an all-reduce, then a slice.
            sent.append(_Sent("all-reduce", shards, gathered, times, by_layer=True))
    copies = tuple(a for a in ("replica", "data") if mesh.get(a, 1) > 1)
    if copies:
        gradients = state_bytes(plans).gradients
        sent.append(_Sent("all-reduce", copies, gradients, 1))
    activation = micro * model.embed_dim * width
    if mesh.get("tensor", 1) > 1:
        sums = (4 if candidate.remat == "none" else 5) + (2 if ticks else 0)
        count = sums * model.num_layers // mesh.get("pipeline", 1) * times
        sent.append(_Sent("all-reduce", ("tensor",), activation, count))
    if ticks:
        sends = 2 * ticks.table.num_ticks * candidate.accumulation
        sent.append(_Sent("collective-permute", ("pipeline",), activation, sends))
    return sent


def _logit_bytes(config: ExperimentConfig, micro: int, tensor: int) -> float:
    chunk, length = config.loss.chunk_tokens, config.data.sequence_length
    share = chunk / length if chunk else 1.0
    return 2 * 4 * micro * share * config.model.vocab_size / tensor
