"""A plan as JSON, as DESIGN section 4 has it, and as the lines that people read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from spmd_train.inspect.collectives import collective_summary, format_collectives
from spmd_train.parallel.mesh import mesh_text
from spmd_train.plan.answer import Plan
from spmd_train.plan.overlap import overlap_json, overlap_lines

_PER_DEVICE = ("argument_bytes", "output_bytes", "alias_bytes", "temp_bytes", "peak_bytes")
_COLLECTIVE = ("op", "axes", "network", "count", "bytes", "wire_bytes", "scope")


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as one JSON document, as DESIGN section 4 has it; the rest is under `details`."""
    step, cost = plan.step, plan.cost
    summary = collective_summary(step.collectives) if step else None
    memory = step.memory if step else {}
    per_device = {name: memory.get(name) for name in _PER_DEVICE}
    if step is None:
        per_device["argument_bytes"] = plan.state.parameters + plan.state.optimizer
        per_device["peak_bytes"] = plan.needed_bytes
    return {
        "target": plan.target.text,
        "num_devices": plan.num_devices,
        "mesh": dict(plan.mesh),
        "fits": plan.fits,
        "hbm_bytes": plan.hbm_bytes,
        "per_device": per_device,
        "collectives": [{name: row[name] for name in _COLLECTIVE} for row in summary["collectives"]]
        if summary
        else [],
        "wire_bytes": summary["wire_bytes"] if summary else None,
        "flops": {"model": plan.model_flops, "program": cost.flops if cost else None},
        "compile_seconds": step.compile_seconds if step else None,
        "predicted": {
            "step_seconds": plan.roofline.step,
            "tokens_per_second": plan.tokens_per_second,
            "mfu": plan.mfu,
            "bound": plan.roofline.bound or None,
        },
        "details": _details(plan, summary),
    }


def _details(plan: Plan, summary: Mapping[str, Any] | None) -> dict[str, Any]:
    cost, chip = plan.cost, plan.target.chip
    return {
        "num_params": plan.num_params,
        "usable_bytes": plan.usable_bytes,
        "state": dataclasses.asdict(plan.state),
        "host_argument_bytes": plan.step.memory["host_argument_bytes"] if plan.step else None,
        "host_bytes_per_host": plan.host_bytes * plan.devices_per_host,
        "host_temp_bytes": plan.step.memory["host_temp_bytes"] if plan.step else None,
        "compiler_peak_bytes": plan.step.memory["compiler_peak_bytes"] if plan.step else None,
        "largest_temporaries": [dataclasses.asdict(array) for array in plan.live[:10]],
        "wire_bytes_by_axes": summary["wire_bytes_by_axes"] if summary else None,
        "async_wire_bytes": summary["async_wire_bytes"] if summary else None,
        "overlap": overlap_json(plan.overlap) if plan.overlap else None,
        "flops_by_phase": cost.flops_by("phase") if cost else None,
        "flops_by_dtype": cost.flops_by("dtype") if cost else None,
        "program_hbm_traffic_bytes": cost.hbm_bytes if cost else None,
        "num_instructions": cost.num_instructions if cost else None,
        "unknown_loops": cost.unknown_loops if cost else None,
        "unknown_kernels": list(cost.unknown_kernels) if cost else None,
        "seconds": dataclasses.asdict(plan.roofline),
        "run": dataclasses.asdict(plan.run),
        "lints": [dataclasses.asdict(lint) for lint in plan.lints],
        "advice": plan.advice,
        "chip_sources": [chip.source, chip.network_source] if chip else [],
        "told_by": {
            "per_device": "compiler",
            "collectives": "compiler (counts and sizes), model (wire bytes of rings)",
            "flops.model": "model",
            "flops.program": "compiler (matmuls of the program)",
            "predicted": "model (roofline) on data sheets",
            "hbm_bytes": "data sheet" if chip else "this machine",
        },
    }


def format_plan(plan: Plan) -> Iterator[str]:
    """The lines that people read; each figure says whose it is."""
    chip = plan.target.chip
    yield (
        f"{plan.num_params:,} parameters on {plan.target.text}: {plan.num_devices} devices, "
        f"{mesh_text(plan.mesh)}"
    )
    yield ""
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    spare = plan.usable_bytes - plan.needed_bytes
    yield (
        f"memory per device: {verdict}: {gib(plan.needed_bytes)} of {gib(plan.usable_bytes)} "
        f"usable ({gib(plan.hbm_bytes)} by the "
        f"{'data sheet' if chip else 'machine, shared out'}), "
        f"{gib(abs(spare))} {'to spare' if spare >= 0 else 'too much'}"
    )
    if plan.advice:
        yield f"  makes it fit: {plan.advice}"
    state = plan.state
    yield f"  {gib(state.parameters):>11}  parameters (plan, exact)"
    yield f"  {gib(state.optimizer):>11}  optimizer state (plan, exact)"
    if state.host:
        yield f"  {gib(state.host):>11}  moments in the host's memory (plan, exact)"
    if plan.step:
        yield f"  {gib(plan.step.memory['temp_bytes']):>11}  temporaries (compiler), of which"
        yield (
            f"  {gib(state.gradients):>11}  float32 gradients (model); the rest is activations "
            "and buffers"
        )
        if host := plan.step.memory["host_temp_bytes"]:
            yield f"  {gib(host):>11}  temporaries in the host's memory (compiler)"
    if plan.host_bytes:
        yield (
            f"  in the host's memory: {gib(plan.host_bytes)} for each device, "
            f"{gib(plan.host_bytes * plan.devices_per_host)} for the "
            f"{plan.devices_per_host} of a host"
        )
    if plan.live:
        yield "  largest at the fullest moment (model: lifetimes in the compiled program):"
        for array in plan.live[:6]:
            place = "/".join(filter(None, (array.scope, array.source))) or array.instruction
            yield f"  {gib(array.bytes):>11}  {array.shape}  {place}"
    if plan.step:
        yield ""
        yield "collectives per device and step (compiler; wire bytes are those of rings):"
        summary = collective_summary(plan.step.collectives)
        yield from ("  " + line for line in format_collectives(summary).splitlines())
        yield from ("  " + line for line in overlap_lines(plan.overlap))
    yield ""
    yield from _speed(plan)
    for lint in plan.lints:
        yield f"lint {lint.name}: {lint.message}"


def _speed(plan: Plan) -> Iterator[str]:
    cost, times = plan.cost, plan.roofline
    if cost is None:
        return
    phases = ", ".join(
        f"{phase} {flops / cost.flops:.0%}" for phase, flops in cost.flops_by("phase").items()
    )
    yield (
        f"FLOPs per device and step: {plan.model_flops:.3e} the model needs (6ND and causal "
        f"attention), {cost.flops:.3e} the program's matmuls take ({phases})"
    )
    if cost.unknown_kernels:
        yield f"  not in it: kernels that do not tell, {', '.join(cost.unknown_kernels[:4])}"
    if times.compute is None or times.hbm is None:
        yield "no step time: the chip's rates are not known (set plan.chip.flops, ...)"
        return
    parts = {"matmuls": times.compute, "memory": times.hbm, "ICI": times.ici, "DCN": times.dcn}
    if times.bubble:
        parts["pipeline's bubble"] = times.bubble
    if plan.state.host:
        parts["moments to the host and back"] = times.host
    told = ", ".join(
        f"{name} {'unknown' if seconds is None else f'{seconds:.3f} s'}"
        for name, seconds in parts.items()
    )
    yield f"roofline per step (model, on data-sheet rates): {told}; bound by {times.bound}"
    if times.step is None or plan.tokens_per_second is None or plan.mfu is None:
        yield "no step time: a rate is not known (set plan.chip.dcn_bandwidth, host_bandwidth, ...)"
        return
    yield (
        f"predicted (model, at best): {times.step:.3f} s a step, "
        f"{plan.tokens_per_second:,.0f} tokens/s, MFU {plan.mfu:.1%}"
    )
    run = plan.run
    priced = [
        text
        for text, value in (
            (f"${run.dollars:,.0f}" if run.dollars else "", run.dollars),
            (f"{run.kilowatt_hours:,.0f} kWh" if run.kilowatt_hours else "", run.kilowatt_hours),
        )
        if value
    ]
    yield (
        f"{run.tokens:,} tokens: {run.hours:,.1f} h, {run.device_hours:,.0f} device-hours"
        + "".join(f", {text}" for text in priced)
    )
    if plan.step:
        yield (
            f"traced in {plan.step.lower_seconds:.1f} s, compiled in "
            f"{plan.step.compile_seconds:.1f} s; {cost.num_instructions:,} instructions"
        )


def gib(count: float) -> str:
    """Bytes as people read them: GiB, or MiB where they are few."""
    return f"{count / 2**30:.3f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"
