"""What a compiled program keeps in memory at its fullest moment.

TPU compilers tell how many bytes the temporaries take, not which they are. This reads it out of
the scheduled HLO text: an array lives from the instruction that makes it to its last use; tuples,
bitcasts, loops and in-place updates pass arrays on. An estimate: the compiler's own assignment
also packs, pads and shares.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

from spmd_train.inspect.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
    clean_op_name,
    parse_hlo,
)

_LEAF = re.compile(r"[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?")
_ON_CHIP = re.compile(r"S\([1-9]\d*\)")
_ALIAS = re.compile(r"\{([\d, ]*)\}:\s*\((\d+),\s*\{([\d, ]*)\}")
_SAME = frozenset(
    (
        "bitcast",
        "opt-barrier",
        "copy-done",
        "all-gather-done",
        "all-reduce-done",
        "async-done",
        "collective-permute-done",
        "optimization-barrier",
        "add-dependency",
    )
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveArray:
    """An array that is there at the fullest moment.

    Attributes:
        shape: HLO shape without its layout.
        bytes: how large.
        scope: `jax.named_scope` path of what made it.
        source: the primitive that made it.
        instruction: its name.
    """

    shape: str
    bytes: int
    scope: str
    source: str
    instruction: str


def live_at_peak(hlo_text: str) -> list[LiveArray]:
    """The temporaries at a program's fullest moment, largest first.

    Args:
        hlo_text: `jax.stages.Compiled.as_text()` of a scheduled program.
    """
    return sorted(_Peaks(parse_hlo(hlo_text)).entry(), key=lambda array: -array.bytes)


@dataclasses.dataclass
class _Buffer:
    array: LiveArray | None  # None: it belongs to the caller, or is on the chip.
    born: int
    last: int


_Leaves = list[set[int]]


class _Peaks:
    def __init__(self, module: Module) -> None:
        self.module = module
        self.known: dict[str, list[LiveArray]] = {}

    def entry(self) -> list[LiveArray]:
        return self.of(self.module.entry)

    def of(self, computation: Computation) -> list[LiveArray]:
        """What a computation adds to its caller's memory at its own fullest moment."""
        if computation.name not in self.known:
            self.known[computation.name] = _sweep(self, computation)
        return self.known[computation.name]

    def inside(self, instruction: Instruction) -> list[LiveArray]:
        """What an instruction needs while it runs, besides operands and results."""
        if instruction.opcode not in ("while", "conditional", "call", "async-start"):
            return []
        peaks = [
            self.of(self.module.computations[name])
            for role, names in instruction.callees.items()
            if role != "condition"
            for name in names
        ]
        return max(peaks, key=_total, default=[])


def _sweep(peaks: _Peaks, computation: Computation) -> list[LiveArray]:
    instructions = list(computation.instructions.values())
    buffers: list[_Buffer] = []
    values: dict[str, _Leaves] = {}
    for time, instruction in enumerate(instructions):
        operands = [values[name] for name in instruction.operands if name in values]
        leaves = _value(instruction, operands, buffers, time)
        values[instruction.name] = leaves
        passes = instruction.opcode in ("tuple", "get-tuple-element", "bitcast")
        for operand in () if passes else operands:
            for leaf in operand:
                for i in leaf:
                    buffers[i].last = time
        # A pass-through keeps its operands alive as long as it is used itself: shared ids do that.
    # What a loop's body or the program returns is written over what it was given.
    for leaf in values[computation.root.name]:
        for i in leaf:
            buffers[i].array = None
    _share(instructions, values, buffers)
    best: list[LiveArray] = []
    inner_total, best_total = 0, -1
    changes: dict[int, list[tuple[int, _Buffer]]] = {}
    for buffer in buffers:
        if buffer.array is not None:
            changes.setdefault(buffer.born, []).append((1, buffer))
            changes.setdefault(buffer.last + 1, []).append((-1, buffer))
    live: dict[int, _Buffer] = {}
    outer_total = 0
    for time, instruction in enumerate(instructions):
        for sign, buffer in changes.get(time, ()):
            assert buffer.array is not None
            outer_total += sign * buffer.array.bytes
            if sign > 0:
                live[id(buffer)] = buffer
            else:
                live.pop(id(buffer), None)
        inner = peaks.inside(instruction)
        inner_total = _total(inner)
        if outer_total + inner_total > best_total:
            best_total = outer_total + inner_total
            best = [b.array for b in live.values() if b.array is not None] + inner
    return best


def _share(
    instructions: Sequence[Instruction], values: Mapping[str, _Leaves], buffers: list[_Buffer]
) -> None:
    """An elementwise kernel writes over an operand of the same size that nobody reads again."""
    for time, instruction in enumerate(instructions):
        if "kind=kLoop" not in instruction.attribute_text:
            continue
        dying = [
            buffers[i]
            for name in instruction.operands
            for leaf in values.get(name, ())
            for i in leaf
            if buffers[i].last == time > buffers[i].born
        ]
        for leaf in values[instruction.name]:
            for i in leaf:
                array = buffers[i].array
                if array is None or buffers[i].born != time:
                    continue
                for old in dying:
                    if old.array is not None and old.array.bytes == array.bytes:
                        old.last = time - 1
                        dying.remove(old)
                        break


def _value(
    instruction: Instruction, operands: Sequence[_Leaves], buffers: list[_Buffer], time: int
) -> _Leaves:
    """The buffers behind each array of an instruction's result; new ones are added."""
    opcode = instruction.opcode
    shapes = _LEAF.findall(instruction.shape)
    if opcode == "parameter" or opcode == "constant":
        return _new(instruction, [], len(shapes), buffers, time)
    if opcode == "tuple":
        return [leaf for operand in operands for leaf in operand]
    if opcode == "get-tuple-element":
        return _element(instruction, operands[0])
    if opcode in _SAME or opcode == "while" or opcode.endswith("-done"):
        given = operands[0]
        return given if len(given) == len(shapes) else given[-len(shapes) :] if shapes else []
    if opcode == "dynamic-update-slice":
        return [operands[0][0]]
    made = _new(instruction, shapes, len(shapes), buffers, time)
    if opcode.endswith("-start") and operands and operands[0]:
        # The result repeats the operands in front of the outputs.
        flat = [leaf for operand in operands for leaf in operand]
        for i, leaf in enumerate(flat[: len(made)]):
            if i < len(made) and shapes[i] and len(made) > len(flat):
                made[i] = leaf
    for output, operand, place in _ALIAS.findall(
        instruction.attributes.get("output_to_operand_aliasing", "")
    ):
        source = operands[int(operand)] if int(operand) < len(operands) else []
        at = int(output) if output.strip() else 0
        if source and at < len(made):
            made[at] = source[int(place) if place.strip() else 0]
    return made


def _element(instruction: Instruction, leaves: _Leaves) -> _Leaves:
    index = int(instruction.attributes["index"])
    # Nested tuples are flat here; only those of arrays are exact.
    return [leaves[index]] if index < len(leaves) else []


def _new(
    instruction: Instruction, shapes: Sequence[str], count: int, buffers: list[_Buffer], time: int
) -> _Leaves:
    leaves: _Leaves = []
    scope, source = clean_op_name(instruction.op_name)
    for i in range(count):
        array = None
        if shapes and not _ON_CHIP.search(shapes[i]):
            size = sum(size for _, size in array_bytes(shapes[i]))
            shape = shapes[i].partition("{")[0]
            array = LiveArray(
                shape=shape, bytes=size, scope=scope, source=source, instruction=instruction.name
            )
        leaves.append({len(buffers)})
        buffers.append(_Buffer(array, time, time))
    return leaves


def _total(arrays: Sequence[LiveArray]) -> int:
    return sum(array.bytes for array in arrays)
