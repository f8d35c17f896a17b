"""How long the collectives of a step keep the network busy: a model, from data sheets.

A ring moves what the counter calls wire bytes; how fast depends on how many of a chip's links the
ring may use. A mesh axis that lies along one torus dim has the two links of that dim where the dim
is whole and its ends are joined, else one; along two dims twice that; a switch (NVLink) gives
everyone its whole rate. Across slices or nodes, n devices of each first combine what they have
(Google's multislice and NCCL's trees do so): 1/n of the payload is each device's part on the slow
network. Model of rings on tori: "How to scale your model", https://jax-ml.github.io/scaling-book.
Latency is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from spmd_train.inspect.collectives import Collective
from spmd_train.parallel.chips import Chip
from spmd_train.parallel.mesh import slices_of
from spmd_train.plan.overlap import hidden_seconds
from spmd_train.plan.targets import Target

_PASSES = {"all-reduce": 2.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """The wires of a group of devices.

    Attributes:
        slices: slices or nodes that it reaches.
        inside: its devices within one of them.
        links: ICI links that a ring uses at one time; 0: a switch.
    """

    slices: int
    inside: int
    links: int


def span_of(
    axes: Sequence[str], *, mesh: Mesh, target: Target, group_size: int = 1, slices: int = 1
) -> Span:
    """The wires of a collective over some mesh axes.

    Args:
        axes: as the counter names them.
        mesh: whose devices have coordinates on the torus.
        target: how they are wired.
        group_size: devices in the group, where the axes do not tell: `("other",)`.
        slices: that it reaches, likewise.
    """
    names = list(mesh.shape)
    if any(axis not in names for axis in axes) or not axes:
        links = 2 if target.platform == "tpu" else 0
        return Span(slices=slices, inside=max(group_size // slices, 1), links=links)
    index = tuple(slice(None) if name in axes else 0 for name in names)
    group = list(np.asarray(mesh.devices[index]).flat)
    where = slices_of(group)
    first = [device for device, slice_ in zip(group, where, strict=True) if slice_ == where[0]]
    return Span(
        slices=len(set(where)), inside=len(first), links=_links([_coords(d) for d in first], target)
    )


def _coords(device: Any) -> tuple[int, ...]:
    return tuple(getattr(device, "coords", ()))


def _links(coords: Sequence[tuple[int, ...]], target: Target) -> int:
    if target.platform != "tpu":
        return 0
    links = 0
    for dim, (size, wraps) in enumerate(zip(target.shape, target.wraps, strict=True)):
        places = {place[dim] for place in coords}
        if len(places) > 1:
            links += 2 if wraps and len(places) == size else 1
    return max(links, 1)


def seconds_of(
    op: str, *, payload: float, group_size: int, span: Span, chip: Chip
) -> tuple[float | None, float | None]:
    """Seconds of one execution on ICI (or NVLink) and on DCN; None where a rate is not known.

    Args:
        op: the collective.
        payload: bytes per device, as the counter's `bytes_each`.
        group_size: devices that take part.
        span: their wires.
        chip: their rates.
    """
    passes = _PASSES.get(op, 1.0)
    inside, outside = span.inside, span.slices
    ici_bytes = passes * payload * (inside - 1) / inside
    dcn_bytes = passes * payload / inside * (outside - 1) / outside
    if op in ("collective-permute", "collective-broadcast"):
        ici_bytes, dcn_bytes = (payload, 0.0) if outside == 1 else (0.0, payload)
    elif op.endswith("all-to-all"):
        # On a ring most of it passes through others: a quarter of an all-gather of everything.
        ici_bytes = payload * max(1.0, inside / 4) if span.links else ici_bytes
        dcn_bytes = payload * (outside - 1) / outside
    share = 1.0
    if chip.ici_links and span.links:
        links = 1 if op == "collective-permute" else min(span.links, chip.ici_links)
        share = links / chip.ici_links
    ici = 0.0 if ici_bytes == 0 else None
    if ici_bytes and chip.ici_bandwidth:
        ici = ici_bytes / (chip.ici_bandwidth * share)
    dcn = 0.0 if dcn_bytes == 0 else None
    if dcn_bytes and chip.dcn_bandwidth:
        dcn = dcn_bytes / chip.dcn_bandwidth
    return ici, dcn


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkTime:
    """Seconds per step that the networks are busy; None: a rate is not known.

    Attributes:
        ici: on ICI or NVLink.
        dcn: between slices or nodes.
        hidden: of the sum, while something is computed (`overlap.hidden_seconds`).
    """

    ici: float | None
    dcn: float | None
    hidden: float


def network_time(
    collectives: Sequence[Collective],
    *,
    mesh: Mesh,
    target: Target,
    chip: Chip,
    busy: Mapping[str, float],
    branch_share: float = 1.0,
) -> NetworkTime:
    """Sums the network's time over the collectives of a step.

    Args:
        collectives: of a step.
        mesh: whose axes they span.
        target: how its devices are wired.
        chip: their rates.
        busy: instruction to the seconds that it computes in a step.
        branch_share: how often branches run, as for `program_cost`.
    """
    spans: dict[tuple[Any, ...], Span] = {}
    ici, dcn = 0.0, 0.0
    seconds: list[float] = []
    unknown: set[str] = set()
    for c in collectives:
        key = (c.axes, c.group_size, c.slices)
        if key not in spans:
            spans[key] = span_of(
                c.axes, mesh=mesh, target=target, group_size=c.group_size, slices=c.slices
            )
        inside, between = seconds_of(
            c.op, payload=c.bytes_each, group_size=c.group_size, span=spans[key], chip=chip
        )
        unknown |= {n for n, s in (("ici", inside), ("dcn", between)) if s is None}
        count = (c.count or 0) * (branch_share if c.conditional else 1.0)
        ici += (inside or 0.0) * count
        dcn += (between or 0.0) * count
        seconds.append(((inside or 0.0) + (between or 0.0)) * count)
    return NetworkTime(
        ici=None if "ici" in unknown else ici,
        dcn=None if "dcn" in unknown else dcn,
        hidden=hidden_seconds(collectives, seconds, busy),
    )
