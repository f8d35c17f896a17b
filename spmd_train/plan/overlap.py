"""How much of what a step sends runs while it computes, by what it is sent for.

Sent bytes count as overlapped if matmuls run between the start and the done of their collective
(`inspect.meanwhile`). How long they hide is a model: at most what is computed meanwhile takes, and
what is computed hides one collective at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from spmd_train.inspect.collectives import Collective
from spmd_train.parallel.context_methods import METHODS
from spmd_train.plan.hlo_cost import ProgramCost

PURPOSES = {
    "parameter_gathers": "gathers of parameters",
    "gradient_reductions": "reductions of gradients",
    "tensor_parallel": "tensor parallelism",
    "other": "the rest",
}
"""What a step sends for, and in words."""

_TOKEN_AXES = frozenset(("replica", "data", "fsdp", "context"))
_REDUCTIONS = ("all-reduce", "reduce-scatter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Overlap:
    """What is sent for one purpose; per device and step.

    Attributes:
        wire_bytes: sent; collectives of unknown count are left out.
        async_wire_bytes: of them between a start and a done.
        overlapped_wire_bytes: of these with matmuls in between.
        flops: of those matmuls, each counted once.
    """

    wire_bytes: int
    async_wire_bytes: int
    overlapped_wire_bytes: int
    flops: float

    @property
    def share(self) -> float:
        """Overlapped bytes of all; 0 where none is sent."""
        return self.overlapped_wire_bytes / self.wire_bytes if self.wire_bytes else 0.0


def overlap(collectives: Sequence[Collective], cost: ProgramCost) -> dict[str, Overlap]:
    """The overlap of what a step sends, by purpose (a key of `PURPOSES`).

    Args:
        collectives: of a step.
        cost: of the same program.
    """
    flops: dict[str, float] = {}
    for op in cost.operations:
        flops[op.instruction] = flops.get(op.instruction, 0.0) + op.flops * op.count
    told = {}
    for purpose in PURPOSES:
        mine = [c for c in collectives if purpose_of(c) == purpose]
        hidden = [c for c in mine if any(flops.get(name) for name in c.meanwhile)]
        told[purpose] = Overlap(
            wire_bytes=sum(c.wire_bytes or 0 for c in mine),
            async_wire_bytes=sum(c.wire_bytes or 0 for c in mine if c.is_async),
            overlapped_wire_bytes=sum(c.wire_bytes or 0 for c in hidden),
            flops=sum(flops.get(n, 0.0) for n in {n for c in hidden for n in c.meanwhile}),
        )
    return told


def purpose_of(collective: Collective) -> str:
    """What a collective is for, a key of `PURPOSES`, by its op, axes, dtype and phase.

    A gather of floats over an axis of the tokens is one of parameters, but for those of an
    attention that the axis splits: activations lie along it. A reduction over such an axis is one
    of gradients (the head's is made in the forward pass), but for the sums of the forward pass
    (losses) and of the optimizer (norms). A permutation in a collective matmul is what it is a part
    of.
    """
    op = collective.part_of or collective.op
    scopes = collective.scope.split("/")
    over_tokens = not _TOKEN_AXES.isdisjoint(collective.axes) and METHODS.keys().isdisjoint(scopes)
    phase = scopes[0]
    is_sum = phase in ("forward", "optimizer") and collective.source == "reduce_sum"
    if op == "all-gather" and over_tokens and "f" in collective.dtype:
        return "parameter_gathers"
    if op in _REDUCTIONS and over_tokens and not is_sum:
        return "gradient_reductions"
    return "tensor_parallel" if collective.axes == ("tensor",) else "other"


def hidden_seconds(
    collectives: Sequence[Collective],
    seconds: Sequence[float],
    busy: Mapping[str, float],
) -> float:
    """Seconds of a step's collectives that what is computed meanwhile hides.

    Args:
        collectives: of a step, in program order.
        seconds: that each takes, in a whole step.
        busy: instruction to the seconds that it computes, in a whole step.
    """
    left, hidden = dict(busy), 0.0
    for collective, needed in zip(collectives, seconds, strict=True):
        for name in collective.meanwhile:
            part = min(needed, left.get(name, 0.0))
            if part:
                left[name] -= part
                needed -= part
                hidden += part
    return hidden


def overlap_json(told: Mapping[str, Overlap]) -> dict[str, Any]:
    """`overlap` as JSON."""
    return {purpose: dataclasses.asdict(part) for purpose, part in told.items()}


def overlap_lines(told: Mapping[str, Overlap]) -> Iterator[str]:
    """What people read of `overlap`: a line for each purpose that something is sent for."""
    for purpose, part in told.items():
        if part.wire_bytes:
            yield (
                f"{PURPOSES[purpose]}: {part.share:.1%} of {part.wire_bytes:,} wire bytes while "
                f"matmuls run ({part.flops:.3e} FLOPs)"
            )
