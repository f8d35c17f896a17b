"""A step's memory, wire and time from formulas: to choose what is worth compiling.

State bytes are exact (the sharding plan's own), FLOPs too (counted on the traced program). The
rest is a model of a scanned transformer under FSDP x tensor parallelism; the compiler's figures
decide in the end.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any

from spmd_train.config import ExperimentConfig
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.plan import LeafPlan, plan_params, plan_state
from spmd_train.plan.network import Span, seconds_of
from spmd_train.plan.sizes import StateBytes, state_bytes
from spmd_train.plan.trace_cost import TraceCost

_COMPUTE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout to try.

    Attributes:
        mesh: axis to size, slices and nodes included.
        dcn: axis to its size between slices or nodes.
        remat: `model.remat`.
        accumulation: `train.grad_accumulation`.
    """

    mesh: Mapping[str, int]
    dcn: Mapping[str, int]
    remat: str
    accumulation: int

    @property
    def overrides(self) -> dict[str, Any]:
        """Config keys to values."""
        within = {a: n // self.dcn.get(a, 1) for a, n in self.mesh.items()}
        return {
            **{f"mesh.{axis}": size for axis, size in within.items()},
            **{f"mesh.dcn.{axis}": self.dcn.get(axis, 1) for axis in self.mesh},
            "model.remat": self.remat,
            "train.grad_accumulation": self.accumulation,
        }

    @property
    def name(self) -> str:
        """Short, for tables."""
        axes = [f"{a}={n}" for a, n in self.mesh.items() if n > 1] or ["one device"]
        crossing = [f"{a} {n} between" for a, n in self.dcn.items() if n > 1]
        parts = [" x ".join(axes), *crossing, f"remat {self.remat}"]
        return ", ".join(parts + ([f"/{self.accumulation}"] if self.accumulation > 1 else []))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a candidate takes, per device and step, by formulas.

    Attributes:
        state: the train state: exact.
        peak_bytes: memory.
        flops: of matmuls.
        wire_bytes: sent.
        compute: seconds at the chip's peak.
        network: seconds on ICI and DCN.
        step: seconds.
        bound: `compute`, `hbm`, `ici` or `dcn`.
    """

    state: StateBytes
    peak_bytes: float
    flops: float
    wire_bytes: float
    compute: float
    network: float
    step: float
    bound: str


@dataclasses.dataclass(frozen=True)
class _Sent:
    op: str
    axes: tuple[str, ...]
    payload: float
    count: int
    hidden: bool


def plans_on(
    program: Any, config: ExperimentConfig, mesh: Mapping[str, int]
) -> dict[str, LeafPlan]:
    """The sharding plan of a program's state on another mesh, without building anything.

    Raises:
        ConfigError: the mesh does not divide the model.
    """
    shaped: Any = types.SimpleNamespace(shape=mesh)
    rules = program.layout.rules
    params = plan_params(
        program.model.abstract_params,
        program.model.logical_axes,
        rules=rules,
        overrides=config.sharding.overrides,
        mesh=shaped,
    )
    return plan_state(program.abstract_state, params, rules=rules, mesh=shaped)


def estimate(
    candidate: Candidate,
    config: ExperimentConfig,
    *,
    plans: Mapping[str, LeafPlan],
    trace: TraceCost,
    chip: Chip,
    spans: Mapping[tuple[str, ...], Span],
) -> Estimate:
    """Estimates a candidate.

    Args:
        candidate: what to estimate.
        config: of the experiment; the candidate's own settings replace its.
        plans: the train state's plan on the candidate's mesh.
        trace: of the program with the candidate's remat, one microbatch.
        chip: rates.
        spans: mesh axes to their wires.
    """
    mesh, model = candidate.mesh, config.model
    num_devices = math.prod(mesh.values())
    state = state_bytes(plans)
    width = _COMPUTE_BYTES[model.compute_dtype]
    tensor = mesh.get("tensor", 1)
    split = num_devices // tensor
    tokens = config.train.global_batch_size * config.data.sequence_length // split
    micro = tokens // candidate.accumulation
    in_compute = _gathered_bytes(plans, mesh, width)
    sent = _sent(candidate, config, gathered=in_compute, micro=micro, plans=plans)

    kept = (trace.kept_wide / split + trace.kept_inner / num_devices) / candidate.accumulation
    largest_layer = in_compute / max(model.num_layers, 1)
    saved_weights = in_compute if candidate.remat == "none" and mesh.get("fsdp", 1) > 1 else 0
    working = micro * (4 * model.embed_dim + 4 * model.mlp_dim / tensor) * width
    logits = _logit_bytes(config, micro, tensor)
    temporary = kept + saved_weights + state.gradients + 3 * largest_layer + working + logits
    peak_bytes = state.parameters + state.optimizer + temporary

    flops = trace.flops / num_devices
    peak_rate = chip.flops[model.compute_dtype]
    passes = 3 if candidate.remat == "none" else 4
    traffic = (
        passes * in_compute * candidate.accumulation
        + 3 * (state.parameters + state.optimizer)
        + 2 * kept * candidate.accumulation
        + passes * model.num_layers * working * candidate.accumulation
    )
    compute, moving = flops / peak_rate, traffic / chip.hbm_bandwidth
    wire, ici, dcn, hidden = 0.0, 0.0, 0.0, 0.0
    for s in sent:
        span = spans[s.axes]
        group = math.prod(mesh[a] for a in s.axes)
        inside, between = seconds_of(
            s.op, payload=s.payload, group_size=group, span=span, chip=chip
        )
        ici += (inside or 0.0) * s.count
        dcn += (between or 0.0) * s.count
        hidden += ((inside or 0.0) + (between or 0.0)) * s.count if s.hidden else 0.0
        wire += (2 if s.op == "all-reduce" else 1) * s.payload * (group - 1) / group * s.count
    on_chip = max(compute, moving)
    parts = {"compute": compute, "hbm": moving, "ici": ici, "dcn": dcn}
    return Estimate(
        state=state,
        peak_bytes=peak_bytes,
        flops=flops,
        wire_bytes=wire,
        compute=compute,
        network=ici + dcn,
        step=max(on_chip, hidden) + ici + dcn - hidden,
        bound=max(parts, key=lambda name: parts[name]),
    )


def _gathered_bytes(plans: Mapping[str, LeafPlan], mesh: Mapping[str, int], width: int) -> float:
    """Parameters of one tensor shard in the compute dtype: what a device computes with."""
    fsdp = mesh.get("fsdp", 1)
    return sum(
        math.prod(plan.shape)
        * plan.bytes_per_device
        / plan.bytes
        * width
        * (fsdp if "fsdp" in str(plan.spec) else 1)
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
    mesh, model, times = candidate.mesh, config.model, candidate.accumulation
    width = _COMPUTE_BYTES[model.compute_dtype]
    sent = []
    if mesh.get("fsdp", 1) > 1:
        gathers = 1 if candidate.remat == "none" else 2
        sent.append(_Sent("all-gather", ("fsdp",), gathered, gathers * times, hidden=True))
        # What compilers make of a gradient that ends up sharded: an all-reduce, then a slice.
        sent.append(_Sent("all-reduce", ("fsdp",), gathered, times, hidden=False))
    copies = tuple(a for a in ("replica", "data") if mesh.get(a, 1) > 1)
    if copies:
        gradients = state_bytes(plans).gradients
        sent.append(_Sent("all-reduce", copies, gradients, 1, hidden=False))
    if mesh.get("tensor", 1) > 1:
        activation = micro * model.embed_dim * width
        sums = 4 if candidate.remat == "none" else 5
        count = sums * model.num_layers * times
        sent.append(_Sent("all-reduce", ("tensor",), activation, count, hidden=False))
    return sent


def _logit_bytes(config: ExperimentConfig, micro: int, tensor: int) -> float:
    chunk, length = config.loss.chunk_tokens, config.data.sequence_length
    share = chunk / length if chunk else 1.0
    return 2 * 4 * micro * share * config.model.vocab_size / tensor
