"""Counts the collectives that a compiled program executes per step, and what they send.

`count_collectives` walks the HLO text of a compiled program from its entry, through loops (times
their trip count), branches, fusions and asynchronous computations. Bytes are logical (no padding)
and per device:

| op | `bytes` of one execution | `wire_bytes`: sent by a device, in a group of n |
|---|---|---|
| all-reduce | the buffer | 2(n-1)/n of it |
| all-gather | the output | (n-1)/n of it |
| reduce-scatter | the input | (n-1)/n of it |
| all-to-all, ragged-all-to-all | the input | (n-1)/n of it (ragged: at most) |
| collective-permute, collective-broadcast | the input | all of it |

The wire bytes are those of ring algorithms, the least that any algorithm can send (Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009). What passes
through a device on its way to another, in an all-to-all or a far permutation, is not in them.

TPU compilers write a reduce-scatter as an all-reduce and a slice in one fusion named
`all-reduce-scatter`; the chip runs it as a reduce-scatter and so it is counted. An all-reduce whose
result is sliced by another instruction is an all-reduce.

Not seen: what a custom kernel sends by itself (Pallas remote copies), and transfers to the host.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spmd_train.inspect.call_tree import SEND_PAIRS, Site, async_chain, collective_sites
from spmd_train.inspect.hlo import Module, array_bytes, clean_op_name, parse_hlo
from spmd_train.inspect.meanwhile import run_meanwhile
from spmd_train.inspect.replica_groups import LogicalMesh
from spmd_train.observe.columns import columns

# Wire bytes of one execution as a multiple of bytes * (n - 1) / n; None: all bytes, whatever n.
_RING_PASSES: Mapping[str, int | None] = {
    "all-reduce": 2,
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "ragged-all-to-all": 1,
    "collective-permute": None,
    "collective-broadcast": None,
}
# Ops whose replica groups hold partitions, not replicas, when they have a channel.
_PARTITION_IDS = frozenset(_RING_PASSES) - {"all-reduce", "all-gather", "reduce-scatter"}
# The body of a loop that XLA makes of a matmul and a collective.
_COLLECTIVE_MATMUL = re.compile(r"windowed_dot_general_body_(ag|rs)")
_AMOUNTS = ("count", "bytes", "wire_bytes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction of a compiled program and how often a step executes it.

    Attributes:
      op: `all-reduce`, `all-gather`, `reduce-scatter`, `all-to-all`, `ragged-all-to-all`,
        `collective-permute` or `collective-broadcast`.
      axes: mesh axes it spans, in mesh order; `("other",)` if its groups are no product of axes;
        `()` if every group is a single device.
      slices: slices or nodes that a group reaches.
      count: executions per step, loops multiplied out; None if a loop's trip count is unknown.
      conditional: in a branch; `count` is as if that branch were taken every time.
      dtype: HLO element type(s) of the payload.
      group_size: devices that take part in one group.
      bytes_each: payload per device of one execution (see the module's table).
      wire_bytes_each: bytes a device sends in one execution.
      scope: `jax.named_scope` path, led by `forward`, `backward` or `recompute` where a gradient
        is taken.
      source: the JAX primitive(s) it came from.
      is_async: it has a start and a done, so that other work may hide it.
      name: the HLO instruction.
      meanwhile: instructions that run between its start and its done.
      part_of: `all-gather` or `reduce-scatter`, if it is a permutation in a loop that XLA made of
        that and a matmul (a collective matmul); else empty.
    """

    op: str
    axes: tuple[str, ...]
    slices: int
    count: int | None
    conditional: bool
    dtype: str
    group_size: int
    bytes_each: int
    wire_bytes_each: int
    scope: str
    source: str
    is_async: bool
    name: str
    meanwhile: tuple[str, ...] = ()
    part_of: str = ""

    @property
    def network(self) -> str:
        """`dcn` if a group reaches more than one slice or node, else `ici`."""
        return "dcn" if self.slices > 1 else "ici"

    @property
    def bytes(self) -> int | None:
        """Payload per device and step; None if the count is unknown."""
        return None if self.count is None else self.count * self.bytes_each

    @property
    def wire_bytes(self) -> int | None:
        """Bytes a device sends per step; None if the count is unknown."""
        return None if self.count is None else self.count * self.wire_bytes_each


def count_collectives(
    hlo_text: str, *, axis_sizes: Mapping[str, int], slices: Sequence[int] | None = None
) -> list[Collective]:
    """Every collective that a step executes, in program order.

    Args:
      hlo_text: `jax.stages.Compiled.as_text()`.
      axis_sizes: `jax.sharding.Mesh.shape` of the mesh the program was compiled for. Device ids do
        not matter: HLO numbers the devices by their place in `mesh.devices.flat`.
      slices: for each device of `mesh.devices.flat` its slice or node; None: one slice.

    Raises:
      ValueError: the text is no HLO, or was compiled for another number of devices.
    """
    module = parse_hlo(hlo_text)
    mesh = LogicalMesh(module, axis_sizes=axis_sizes, slices=slices)
    return [_describe(site, mesh, module) for site in collective_sites(module)]


def collective_summary(collectives: Iterable[Collective]) -> dict[str, Any]:
    """Collectives grouped by what they do and where, as JSON.

    Returns:
      `collectives`: a row per (op, axes, network, dtype, scope, source, conditional, async), most
      wire bytes first, with `count`, `bytes` and `wire_bytes` per device and step (null where a
      trip count is unknown). `wire_bytes`: their total over the rows whose count is known, each
      branch of a conditional as if taken; `conditional_wire_bytes` and `async_wire_bytes` are
      parts of it; `wire_bytes_by_axes` divides it (`"data+fsdp"` for an op over both).
      `unknown_count`: instructions whose count is unknown.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    by_axes: dict[str, int] = {}
    listed = list(collectives)
    for c in listed:
        labels = {
            "op": c.op,
            "axes": list(c.axes),
            "network": c.network,
            "scope": c.scope,
            "source": c.source,
            "dtype": c.dtype,
            "group_size": c.group_size,
            "conditional": c.conditional,
            "async": c.is_async,
        }
        key = (*map(str, labels.values()), c.count is None)
        zero = None if c.count is None else 0
        row = rows.setdefault(key, labels | {"count": zero, "bytes": zero, "wire_bytes": zero})
        if c.count is not None:
            row["count"] += c.count
            row["bytes"] += c.count * c.bytes_each
            row["wire_bytes"] += c.count * c.wire_bytes_each
            axes = "+".join(c.axes)
            by_axes[axes] = by_axes.get(axes, 0) + c.count * c.wire_bytes_each
    return {
        "collectives": sorted(rows.values(), key=lambda row: -(row["wire_bytes"] or 0)),
        "wire_bytes": sum(c.wire_bytes or 0 for c in listed),
        "conditional_wire_bytes": sum(c.wire_bytes or 0 for c in listed if c.conditional),
        "async_wire_bytes": sum(c.wire_bytes or 0 for c in listed if c.is_async),
        "wire_bytes_by_axes": by_axes,
        "unknown_count": sum(c.count is None for c in listed),
    }


def format_collectives(summary: Mapping[str, Any]) -> str:
    """A summary of `collective_summary` as an aligned table, bytes in full."""
    header = ("op", "axes", "network", "count", "bytes", "wire bytes", "dtype", "scope")
    lines: list[tuple[str, ...]] = [header]
    for row in summary["collectives"]:
        marks = [mark for mark in ("conditional", "async") if row[mark]]
        place = "/".join(filter(None, (row["scope"], row["source"])))
        lines.append(
            (
                row["op"],
                "+".join(row["axes"]) or "-",
                row["network"],
                *("unknown" if row[k] is None else f"{row[k]:,}" for k in _AMOUNTS),
                row["dtype"],
                " ".join([place, *(f"({mark})" for mark in marks)]),
            )
        )
    text = list(columns(lines, right=(3, 4, 5)))
    for axes, num_bytes in sorted(summary["wire_bytes_by_axes"].items(), key=lambda item: -item[1]):
        text.append(f"{axes or 'one device'}: {num_bytes:,} wire bytes per device and step")
    text.append(f"all: {summary['wire_bytes']:,} wire bytes per device and step")
    if summary["unknown_count"]:
        text.append(f"not in it: {summary['unknown_count']} in loops of unknown length")
    if summary["conditional_wire_bytes"]:
        text.append(f"of it in branches, if taken: {summary['conditional_wire_bytes']:,}")
    return "\n".join(text)


def _describe(site: Site, mesh: LogicalMesh, module: Module) -> Collective:
    instruction, op = site.instruction, site.op
    sent_pairs = SEND_PAIRS.search(instruction.attribute_text)
    pairs = sent_pairs[1] if sent_pairs else instruction.attributes.get("source_target_pairs")
    span = mesh.span(instruction, pairs=pairs, partition_ids=op in _PARTITION_IDS)

    operands = instruction.operands
    operands = operands[:1] if op == "ragged-all-to-all" or sent_pairs else operands
    arrays = [
        array
        for name in operands
        for array in array_bytes(site.computation.instructions[name].shape)
    ]
    payload = sum(num_bytes for _, num_bytes in arrays)
    if op == "all-gather":
        payload *= span.group_size
    passes = _RING_PASSES[op]
    if span.group_size == 1:
        wire = 0
    elif passes is None:
        wire = payload
    else:
        wire = -(-passes * payload * (span.group_size - 1) // span.group_size)

    named = next((i for i in (instruction, *site.callers) if i.op_name), instruction)
    scope, source = clean_op_name(named.op_name)
    if named.opcode in ("while", "conditional"):
        source = ""
    starts = [
        i
        for i in (instruction, *site.callers)
        if i.opcode.endswith("-start") or i.opcode == "send" or async_chain(i)
    ]
    is_async = bool(starts) and not any('"is_sync":true' in i.attribute_text for i in starts)
    return Collective(
        op=op,
        axes=span.axes,
        slices=span.slices,
        count=site.count,
        conditional=site.conditional,
        dtype="+".join(sorted({dtype for dtype, _ in arrays})),
        group_size=span.group_size,
        bytes_each=payload,
        wire_bytes_each=wire,
        scope=scope,
        source=source,
        is_async=is_async,
        name=instruction.name,
        meanwhile=run_meanwhile(site, module) if is_async else (),
        part_of=_part_of(site),
    )


def _part_of(site: Site) -> str:
    for computation in site.computations:
        if loop := _COLLECTIVE_MATMUL.search(computation.name):
            return {"ag": "all-gather", "rs": "reduce-scatter"}[loop[1]]
    return ""
