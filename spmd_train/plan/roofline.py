"""The least time a step can take on a chip whose rates are known: a model, not a measurement."""

from __future__ import annotations

import dataclasses

from spmd_train.parallel.chips import Chip
from spmd_train.plan.hlo_cost import Operation, ProgramCost
from spmd_train.plan.network import NetworkTime

_DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "s8": "int8",
    "f8e4m3fn": "float8",
    "f8e5m2": "float8",
}
"""HLO's element types of matmuls to the keys of `Chip.flops`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Seconds per step; None: a rate is not known.

    Attributes:
        compute: matmuls at the chip's highest rate.
        hbm: memory traffic at its bandwidth.
        on_chip: kernel by kernel the longer of the two, summed.
        ici: collectives within slices or nodes.
        dcn: collectives between them.
        bubble: what a pipeline's device waits for others; 0 without stages.
        host: moments out of the host's memory, then back: nothing hides them.
        step: `on_chip`, `bubble`, `host` and what of the collectives nothing hides.
        bound: `compute`, `hbm`, `ici`, `dcn`, `bubble` or `host`: the longest; empty where nothing
            is known.
    """

    compute: float | None
    hbm: float | None
    on_chip: float | None
    ici: float | None
    dcn: float | None
    bubble: float | None
    host: float | None
    step: float | None
    bound: str


def roofline(
    cost: ProgramCost | None,
    *,
    network: NetworkTime | None,
    chip: Chip | None,
    dtype: str,
    bubble: float = 0.0,
    host_bytes: int = 0,
) -> Roofline:
    """Times of a compiled step.

    Args:
        cost: what it executes; None: there is no program.
        network: what it sends; None where the chip's networks are not known.
        chip: its rates; None: not known.
        dtype: the compute dtype, for matmuls that the program does not tell the dtype of.
        bubble: the part of the time in which a pipeline's device waits, 0 to 1.
        host_bytes: moments that a step takes out of the host's memory and puts back.
    """
    peak = chip.flops.get(dtype) if chip else None
    if cost is None or chip is None or peak is None or network is None:
        names = ("compute", "hbm", "on_chip", "ici", "dcn", "bubble", "host", "step")
        return Roofline(bound="", **dict.fromkeys(names))
    compute = hbm = on_chip = 0.0
    for op in cost.operations:
        busy, moving = _seconds(op, chip=chip, peak=peak)
        compute += busy * op.count
        hbm += moving * op.count
        on_chip += max(busy, moving) * op.count
    waits = on_chip * bubble / (1 - bubble)
    parts = {"compute": compute, "hbm": hbm, "ici": network.ici, "dcn": network.dcn}
    parts |= {"bubble": waits, "host": host_seconds(host_bytes, chip=chip)}
    known = {name: seconds for name, seconds in parts.items() if seconds is not None}
    step = None
    if len(known) == len(parts):
        step = on_chip + sum(known[name] for name in ("bubble", "host", "ici", "dcn"))
        step -= network.hidden
    return Roofline(
        compute=compute,
        hbm=hbm,
        on_chip=on_chip,
        ici=network.ici,
        dcn=network.dcn,
        bubble=waits,
        host=parts["host"],
        step=step,
        bound=max(known, key=lambda name: known[name]),
    )


def host_seconds(moments: int, *, chip: Chip) -> float | None:
    """A step's time to take these bytes out of the host's memory and put them back; None: unknown.

    One after the other: a layer's go back before the next one's come.
    """
    if not moments:
        return 0.0
    return 2 * moments / chip.host_bandwidth if chip.host_bandwidth else None


def busy_seconds(cost: ProgramCost, *, chip: Chip, dtype: str) -> dict[str, float]:
    """Instruction to the seconds that it takes the chip in a step; arguments as `roofline` has."""
    peak, seconds = chip.flops.get(dtype), {}
    if peak is None:
        return {}
    for op in cost.operations:
        once = max(_seconds(op, chip=chip, peak=peak))
        seconds[op.instruction] = seconds.get(op.instruction, 0.0) + once * op.count
    return seconds


def _seconds(op: Operation, *, chip: Chip, peak: float) -> tuple[float, float]:
    """Of one execution: its matmuls, its memory traffic."""
    rate = chip.flops.get(_DTYPES.get(op.dtype, ""), peak)
    return op.flops / rate, op.hbm_bytes / chip.hbm_bandwidth
