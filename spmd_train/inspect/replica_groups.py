"""Which devices of a mesh take part in a collective: HLO's replica groups as mesh axes.

HLO numbers the devices of a program logically: id = replica * num_partitions + partition, and a
partition is a place in `mesh.devices.flat`. Groups are written as lists, as a transposed range
(`[4,2]<=[2,4]T(1,0)`) or as axes of a mesh of the compiler's own
(`mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'y':(1)2}`). See `xla/hlo/ir/replica_group.cc`,
`mesh_and_axis.cc`, and for the meaning of the ids `xla/hlo/ir/collective_op_group_mode.h`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from spmd_train.inspect.hlo import Instruction, Module

OTHER = ("other",)
"""The axes of groups that are no product of whole mesh axes."""

_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[(.*)\]\s*\{(.*)\}", re.DOTALL)
_DEVICE_IDS = re.compile(r"\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\)\s*(\{.*)", re.DOTALL)
_AXIS = re.compile(r"'([^']*)'=(\d+)")
_AXIS_REFERENCE = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True)
class Span:
    """What a collective spans: mesh axes, devices per group, and slices that a group reaches."""

    axes: tuple[str, ...]
    group_size: int
    slices: int


class LogicalMesh:
    """The mesh a module was compiled for, to find what its collectives span.

    Args:
      module: the compiled program.
      axis_sizes: mesh axis -> size, outermost first.
      slices: for each device in mesh order its slice or node; None: one slice.

    Raises:
      ValueError: the program was compiled for another number of devices.
    """

    def __init__(
        self, module: Module, *, axis_sizes: Mapping[str, int], slices: Sequence[int] | None
    ):
        self.names = tuple(axis_sizes)
        self.sizes = tuple(axis_sizes.values())
        self.partitions, self.replicas = module.num_partitions, module.replica_count
        num_devices = self.partitions * self.replicas
        if math.prod(self.sizes) != num_devices or (slices and len(slices) != num_devices):
            raise ValueError(
                f"the program {module.name} was compiled for {num_devices} devices; the mesh "
                f"{dict(axis_sizes)} has {math.prod(self.sizes)}"
                + (f" and {len(slices)} slice numbers were given" if slices else "")
            )
        self.slices = np.array(slices if slices else [0] * num_devices)
        self._spans: dict[tuple[str | None, ...], Span] = {}

    def span(self, instruction: Instruction, *, pairs: str | None, partition_ids: bool) -> Span:
        """What a collective spans.

        Args:
          instruction: the collective.
          pairs: the text of its source-target pairs, if it is a permutation.
          partition_ids: ids are partitions wherever it has a channel (all-to-all, permutation,
            broadcast); otherwise that is so only if it uses global device ids.
        """
        attributes = instruction.attributes
        mode = (
            "replica"
            if "channel_id" not in attributes
            else "global"
            if attributes.get("use_global_device_ids") == "true"
            else "partition"
            if partition_ids
            else "replica+partition"
        )
        groups = attributes.get("replica_groups", "{}")
        key = (mode, pairs, groups, attributes.get("device_ids"))
        if key not in self._spans:
            if pairs is not None:
                self._spans[key] = self._span_of_pairs(self._global(_lists(pairs), mode))
            else:
                listed = self._listed(groups, attributes.get("device_ids"), mode)
                self._spans[key] = self._span_of_groups(self._global(listed, mode))
        return self._spans[key]

    def _listed(self, text: str, device_ids: str | None, mode: str) -> list[np.ndarray]:
        """The groups as they are written, in whatever ids."""
        everyone = {
            "global": self.replicas * self.partitions,
            "partition": self.partitions,
        }.get(mode, self.replicas)
        if re.fullmatch(r"\{[\s{}]*\}", text):
            return [np.arange(everyone)]
        if text.startswith("{"):
            return _lists(text)
        if iota := _IOTA.fullmatch(text):
            dims = _ints(iota[3])
            order = _ints(iota[4]) if iota[4] else range(len(dims))
            ids = np.arange(math.prod(dims)).reshape(dims).transpose(order)
            return list(ids.reshape(int(iota[1]), int(iota[2])))
        # The axes of a mesh with explicit device ids end up in the attribute after the comma.
        ids = None
        if device_ids and (match := _DEVICE_IDS.fullmatch(device_ids)):
            text = f"{text} {match[4]}"
            if match[3]:
                ids = np.array(_ints(match[3]))
            else:
                dims = _ints(match[1])
                ids = np.arange(math.prod(dims)).reshape(dims).transpose(_ints(match[2]))
        if mesh := _MESH.fullmatch(text):
            return _mesh_groups(mesh[1], mesh[2], ids)
        raise ValueError(f"cannot read these HLO replica groups: {text!r} {device_ids or ''}")

    def _global(self, groups: list[np.ndarray], mode: str) -> list[np.ndarray]:
        """Groups of device numbers from groups of replicas or partitions."""
        if mode == "global":
            return groups
        if mode == "partition":
            starts = range(0, self.replicas * self.partitions, self.partitions)
            return [group + start for start in starts for group in groups]
        shards = np.arange(self.partitions)
        if mode == "replica":
            return [group * self.partitions + shard for shard in shards for group in groups]
        return [(group[:, None] * self.partitions + shards).ravel() for group in groups]

    def _span_of_groups(self, groups: list[np.ndarray]) -> Span:
        size = max(len(group) for group in groups)
        slices = max(len(set(self.slices[group])) for group in groups)
        spans = {self._axes_of_group(group) for group in groups}
        return Span(spans.pop() if len(spans) == 1 else OTHER, size, slices)

    def _axes_of_group(self, group: np.ndarray) -> tuple[str, ...]:
        coordinates = np.array(np.unravel_index(group, self.sizes))
        moves = (coordinates != coordinates[:, :1]).any(axis=1)
        whole = math.prod(np.array(self.sizes)[moves].tolist()) == len(group)
        return tuple(np.array(self.names)[moves].tolist()) if whole else OTHER

    def _span_of_pairs(self, pairs: list[np.ndarray]) -> Span:
        """A permutation spans the axes along which any device sends to another."""
        sources, targets = np.array(pairs).reshape(-1, 2).T
        coordinates = (np.array(np.unravel_index(ids, self.sizes)) for ids in (sources, targets))
        moves = np.not_equal(*coordinates).any(axis=1)
        slices = 2 if (self.slices[sources] != self.slices[targets]).any() else 1
        size = math.prod(np.array(self.sizes)[moves].tolist())
        return Span(tuple(np.array(self.names)[moves].tolist()), size, slices)


def _ints(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _lists(text: str) -> list[np.ndarray]:
    """`{{0,2},{1,3}}`."""
    return [np.array(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", text)]


def _mesh_groups(axes: str, group_axes: str, ids: np.ndarray | None) -> list[np.ndarray]:
    """Groups that run along some axes, or parts of axes, of the compiler's own mesh.

    `'x':(2)4` is the part of x of size 4 that comes after a part of size 2.
    """
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    taken = [
        (name, int(before or 1), int(size) if size else sizes[name])
        for name, before, size in _AXIS_REFERENCE.findall(group_axes)
    ]
    dims, grouped = [], []
    for name, axis_size in sizes.items():
        parts = [(before, before * size) for other, before, size in taken if other == name]
        cuts = sorted({1, axis_size, *(cut for part in parts for cut in part)})
        for start, stop in itertools.pairwise(cuts):
            if any(first <= start and stop <= last for first, last in parts):
                grouped.append(len(dims))
            dims.append(stop // start)
    if ids is None:
        ids = np.arange(math.prod(dims))
    others = [dim for dim in range(len(dims)) if dim not in grouped]
    size = math.prod(dims[dim] for dim in grouped)
    return list(ids.reshape(dims).transpose(*others, *grouped).reshape(-1, size))
