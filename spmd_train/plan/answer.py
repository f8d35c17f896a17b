"""The answer of `spmd-train plan`: from a compiled step, its config and its target."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from spmd_train.config import ExperimentConfig, PlanConfig
from spmd_train.observe.flops import model_flops_per_token
from spmd_train.observe.memory import host_bytes
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.schedule_table import Schedule
from spmd_train.plan.compiled import CompiledStep
from spmd_train.plan.hlo_cost import ProgramCost, program_cost
from spmd_train.plan.lints import Lint, find_lints
from spmd_train.plan.live import LiveArray, live_at_peak
from spmd_train.plan.network import NetworkTime, network_time
from spmd_train.plan.overlap import Overlap, overlap
from spmd_train.plan.roofline import Roofline, busy_seconds, roofline
from spmd_train.plan.sizes import StateBytes, num_params, state_bytes
from spmd_train.plan.targets import Target


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What a whole training run takes; None: a price or a time is not known.

    Attributes:
        tokens: it trains on.
        hours: of wall clock.
        device_hours: that times the devices.
        dollars: at `plan.dollars_per_device_hour`.
        kilowatt_hours: at `plan.watts_per_device`.
    """

    tokens: int
    hours: float | None
    device_hours: float | None
    dollars: float | None
    kilowatt_hours: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that is known of a config on a target.

    Attributes:
        target: what it was compiled for.
        mesh: mesh axis to size.
        num_devices: devices of the mesh.
        devices_per_host: that share a host's memory.
        num_params: numbers in the parameters.
        hbm_bytes: a device's memory: the maker's figure, or of `cpu:N` an N-th of this machine's.
        usable_bytes: what of it a program may take, as far as is known.
        state: the train state's bytes.
        step: what the compiler made; None: it ran out of the device's memory.
        needed_bytes: peak per device.
        cost: what the program executes; None without a program.
        live: temporaries at its fullest moment.
        model_flops: per device and step.
        network: the networks' time; None where the chip's is not known.
        schedule: of the pipeline; None without stages.
        roofline: times of a step.
        tokens_per_second: over all devices.
        mfu: model FLOPs utilization, a fraction of 1.
        run: the whole run's cost.
        lints: what looks wrong.
        advice: the nearest change that makes it fit, as overrides; empty where it fits.
    """

    target: Target
    mesh: Mapping[str, int]
    num_devices: int
    devices_per_host: int
    num_params: int
    hbm_bytes: int
    usable_bytes: int
    state: StateBytes
    step: CompiledStep | None
    needed_bytes: int
    cost: ProgramCost | None
    live: tuple[LiveArray, ...]
    model_flops: float
    network: NetworkTime | None
    schedule: Schedule | None
    roofline: Roofline
    tokens_per_second: float | None
    mfu: float | None
    run: Cost
    lints: tuple[Lint, ...]
    advice: str = ""

    @property
    def overlap(self) -> dict[str, Overlap]:
        """What is sent while it computes, by purpose; empty without a program."""
        return overlap(self.step.collectives, self.cost) if self.step and self.cost else {}

    @property
    def host_bytes(self) -> int:
        """What a device has in its host's memory: moments and offloaded temporaries."""
        return self.state.host + (self.step.memory["host_temp_bytes"] if self.step else 0)

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds it."""
        return self.step is not None and self.needed_bytes <= self.usable_bytes


def chip_with(config: PlanConfig, chip: Chip | None, *, dtype: str) -> Chip | None:
    """The table's chip with the config's own figures laid over it."""
    own = config.chip
    if chip is None:
        if not (own.flops and own.hbm_bandwidth):
            return None
        chip = Chip(device_kinds=(), flops={}, hbm_bytes=0, hbm_bandwidth=0.0, source="plan.chip")
    return dataclasses.replace(
        chip,
        flops={**chip.flops, dtype: own.flops} if own.flops else chip.flops,
        hbm_bytes=int(own.hbm_bytes) or chip.hbm_bytes,
        hbm_bandwidth=own.hbm_bandwidth or chip.hbm_bandwidth,
        ici_bandwidth=own.ici_bandwidth or chip.ici_bandwidth,
        dcn_bandwidth=own.dcn_bandwidth or chip.dcn_bandwidth,
        host_bandwidth=own.host_bandwidth or chip.host_bandwidth,
    )


def memory_of(config: PlanConfig, target: Target) -> tuple[int, int]:
    """Bytes of a device, and how many of them a program may take."""
    if config.chip.hbm_bytes:
        return int(config.chip.hbm_bytes), int(config.chip.hbm_bytes)
    if target.chip is None:
        part = host_bytes() // target.num_chips
        return part, part
    hbm = target.chip.hbm_bytes
    # JAX takes three quarters of a GPU at its start (https://docs.jax.dev/en/latest/
    # gpu_memory_allocation.html) unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise. libtpu
    # keeps a quarter of a GiB of every TPU's memory.
    return hbm, int(hbm * 0.75) if target.platform == "gpu" else hbm - 2**28


def times_of(
    step: CompiledStep | None,
    *,
    schedule: Schedule | None,
    mesh: Mesh,
    target: Target,
    chip: Chip | None,
    dtype: str,
    host_bytes: int,
) -> tuple[ProgramCost | None, Roofline, NetworkTime | None]:
    """What a compiled step executes, and its times on a chip.

    Under a schedule a device takes a slot of the tick loop only where the table gives it a unit.
    `host_bytes`: as `roofline` has it.
    """
    if step is None:
        return None, roofline(None, network=None, chip=chip, dtype=dtype), None
    share, bubble = 1.0, 0.0
    if schedule is not None:
        units = schedule.num_microbatches * schedule.num_chunks
        share, bubble = units / schedule.num_ticks, schedule.bubble()
    cost = program_cost(step.hlo_text, branch_share=share)
    network = chip and network_time(
        step.collectives,
        mesh=mesh,
        target=target,
        chip=chip,
        busy=busy_seconds(cost, chip=chip, dtype=dtype),
        branch_share=share,
    )
    times = roofline(
        cost, network=network, chip=chip, dtype=dtype, bubble=bubble, host_bytes=host_bytes
    )
    return cost, times, network


def make_plan(
    config: ExperimentConfig,
    *,
    target: Target,
    program: Any,
    step: CompiledStep | None,
    needed_bytes: int | None = None,
) -> Plan:
    """Reads everything out of a compiled step.

    Args:
        config: of the experiment.
        target: it was compiled for.
        program: a `Program`.
        step: its compiled train step; None: the compiler refused it for want of memory.
        needed_bytes: what the compiler said it would need, if it refused.

    Returns:
        The plan, without advice.
    """
    dtype = config.model.compute_dtype
    chip = chip_with(config.plan, target.chip, dtype=dtype)
    hbm_bytes, usable_bytes = memory_of(config.plan, target)
    schedule = program.pipeline.schedule if program.pipeline is not None else None
    state = state_bytes(program.plans)
    cost, times, network = times_of(
        step,
        schedule=schedule,
        mesh=program.mesh,
        target=target,
        chip=chip,
        dtype=dtype,
        host_bytes=state.host,
    )
    length = config.data.sequence_length
    tokens = config.train.global_batch_size * length
    flops_per_token = model_flops_per_token(config.model, config.moe, sequence_length=length)
    num_devices = program.mesh.size
    model_flops = flops_per_token * tokens / num_devices
    speed = tokens / times.step if times.step else None
    peak = chip.flops.get(dtype) if chip else None
    plan = Plan(
        target=target,
        mesh=dict(program.mesh.shape),
        num_devices=num_devices,
        devices_per_host=max(
            collections.Counter(d.process_index for d in program.mesh.devices.flat).values()
        ),
        num_params=num_params(program.plans),
        hbm_bytes=hbm_bytes,
        usable_bytes=usable_bytes,
        state=state,
        step=step,
        needed_bytes=step.memory["peak_bytes"] if step else needed_bytes or usable_bytes + 1,
        cost=cost,
        schedule=schedule,
        live=tuple(live_at_peak(step.hlo_text)) if step else (),
        model_flops=model_flops,
        network=network,
        roofline=times,
        tokens_per_second=speed,
        mfu=model_flops / (times.step * peak) if times.step and peak else None,
        run=_run_cost(config, speed=speed, num_devices=num_devices),
        lints=(),
    )
    return dataclasses.replace(
        plan,
        lints=tuple(find_lints(config, program=program, step=step, cost=cost, target=target)),
    )


def _run_cost(config: ExperimentConfig, *, speed: float | None, num_devices: int) -> Cost:
    train, plan = config.train, config.plan
    tokens = plan.tokens or train.num_steps * train.global_batch_size * config.data.sequence_length
    hours = tokens / speed / 3600 if speed else None
    device_hours = hours * num_devices if hours is not None else None

    def priced(price: float) -> float | None:
        return device_hours * price if price and device_hours is not None else None

    return Cost(
        tokens=tokens,
        hours=hours,
        device_hours=device_hours,
        dollars=priced(plan.dollars_per_device_hour),
        kilowatt_hours=priced(plan.watts_per_device / 1000),
    )
