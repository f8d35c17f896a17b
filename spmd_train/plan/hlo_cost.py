"""FLOPs and memory traffic of a compiled program, loops multiplied out.

XLA's own `cost_analysis()` counts a loop's body once. Here every instruction that a step executes
is counted as often as it runs. Bytes are an estimate: what each kernel reads and writes if nothing
stays in caches, without what TPU programs keep in on-chip memory (`S(1)` in a layout).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence

from spmd_train.inspect.call_tree import COLLECTIVES
from spmd_train.inspect.hlo import (
    Computation,
    Instruction,
    Module,
    array_bytes,
    clean_op_name,
    parse_hlo,
)
from spmd_train.inspect.loops import trip_count
from spmd_train.plan.dot_flops import instruction_flops

_DIGITS = re.compile(r"\d+")
_ON_CHIP = re.compile(r"[a-z]\w*\[[^\]]*\]\{[^}]*S\(\d+\)[^}]*\}")
_FREE = frozenset(
    (
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "opt-barrier",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
    )
)
# Inside a fusion: an array that it hands on as it is, or that a collective of its own takes.
_PASSED_ON = frozenset(("tuple", *COLLECTIVES))
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))
_BRANCHES = ("branch_computations", "true_computation", "false_computation")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One instruction of a program: a kernel.

    Attributes:
        count: executions per step; a fraction where a pipeline's ticks share them out.
        flops: of one execution: its matmuls and convolutions.
        hbm_bytes: read and written in one execution.
        phase: `forward`, `backward`, `recompute`, `optimizer` or `other`.
        scope: `jax.named_scope` path.
        dtype: element type of its matmuls' operands; empty without any.
        instruction: its name.
    """

    count: float
    flops: float
    hbm_bytes: int
    phase: str
    scope: str
    dtype: str
    instruction: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramCost:
    """What a step executes on one device.

    Attributes:
        operations: every kernel.
        num_instructions: size of the program's text; loops are not multiplied out.
        unknown_loops: loops of unknown length; they are counted once, those in a scope `if_needed`
            not at all.
        unknown_kernels: names of kernels whose FLOPs are not known.
    """

    operations: tuple[Operation, ...]
    num_instructions: int
    unknown_loops: int
    unknown_kernels: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Matmul and convolution FLOPs per device and step."""
        return sum(op.flops * op.count for op in self.operations)

    @property
    def hbm_bytes(self) -> float:
        """Bytes read and written per device and step."""
        return float(sum(op.hbm_bytes * op.count for op in self.operations))

    def flops_by(self, attribute: str) -> dict[str, float]:
        """FLOPs by an attribute of the operations, as `phase` or `dtype`; largest first."""
        sums: dict[str, float] = {}
        for op in self.operations:
            if op.flops:
                key = str(getattr(op, attribute))
                sums[key] = sums.get(key, 0.0) + op.flops * op.count
        return dict(sorted(sums.items(), key=lambda item: -item[1]))


def program_cost(hlo_text: str, *, branch_share: float = 1.0) -> ProgramCost:
    """Counts what a step executes.

    Args:
        hlo_text: `jax.stages.Compiled.as_text()`.
        branch_share: how often the branches of a conditional and loops of unknown length run, of
            the times that they are reached: in a pipeline, units of a device / ticks.

    Raises:
        ValueError: the text cannot be read.
    """
    module = parse_hlo(hlo_text)
    walk = _Walk(module, branch_share)
    operations = tuple(walk.visit(module.entry, 1.0, ""))
    return ProgramCost(
        operations=operations,
        num_instructions=module.num_instructions,
        unknown_loops=walk.unknown_loops,
        unknown_kernels=tuple(dict.fromkeys(walk.unknown_kernels)),
    )


class _Walk:
    def __init__(self, module: Module, branch_share: float) -> None:
        self.module = module
        self.branch_share = branch_share
        self.unknown_loops = 0
        self.unknown_kernels: list[str] = []

    def visit(
        self, computation: Computation, count: float, outer: str, *, shared: bool = False
    ) -> Iterator[Operation]:
        """Every kernel below a computation.

        `outer` is the name stack of its caller; `shared`: it is in a branch, whose share `count`
        has in it. Branches within are those of the busiest device.
        """
        for instruction in computation.instructions.values():
            opcode = instruction.opcode
            if opcode in _FREE or opcode.endswith(("-done", "-update")):
                continue
            op_name = instruction.op_name or outer
            inner = self._control_flow(computation, instruction)
            if inner is not None:
                callees, times, is_branch = inner
                share = self.branch_share if is_branch and not shared else 1.0
                for callee in callees:
                    yield from self.visit(
                        self.module.computations[callee],
                        count * times * share,
                        op_name,
                        shared=shared or is_branch,
                    )
                continue
            scope, _ = clean_op_name(op_name)
            flops, dtype = self._flops(instruction, computation)
            yield Operation(
                count=count,
                flops=flops,
                hbm_bytes=self._bytes(instruction, computation),
                phase=_phase(scope),
                scope=scope,
                dtype=dtype,
                instruction=instruction.name,
            )

    def _control_flow(
        self, computation: Computation, instruction: Instruction
    ) -> tuple[Sequence[str], int, bool] | None:
        """Computations that an instruction runs, how often, and whether it may not run them.

        None if it is a kernel.
        """
        opcode, callees = instruction.opcode, instruction.callees
        if opcode == "while":
            trips = trip_count(self.module, computation, instruction)
            self.unknown_loops += trips is None
            if trips is None:
                seldom = "if_needed" in instruction.op_name.split("/")
                return (() if seldom else callees["body"]), 1, True
            return callees["body"], trips, False
        if opcode == "conditional":
            # At most one runs; that all do is an upper bound.
            return [name for role in _BRANCHES for name in callees.get(role, ())], 1, True
        if opcode in ("call", "async-start"):
            roles = ("to_apply", "calls", "called_computations")
            return [name for role in roles for name in callees.get(role, ())], 1, False
        return None

    def _flops(self, instruction: Instruction, computation: Computation) -> tuple[float, str]:
        if instruction.opcode == "fusion":
            callee = self.module.computations[instruction.callees["calls"][0]]
            inner = [self._flops(i, callee) for i in callee.instructions.values()]
            dtypes = [dtype for _, dtype in inner if dtype]
            return sum(flops for flops, _ in inner), dtypes[0] if dtypes else ""
        flops = instruction_flops(instruction, computation)
        if flops is None:
            self.unknown_kernels.append(instruction.name)
        if not flops:
            return 0.0, ""
        shapes = [computation.instructions[name].shape for name in instruction.operands]
        dtypes = [dtype for shape in shapes for dtype, _ in array_bytes(shape)]
        if instruction.opcode != "custom-call":
            return flops, dtypes[0]
        # A kernel also takes block numbers, masks and float32 sums: it multiplies the narrowest
        # floats or, without any, the narrowest integers.
        floats = [dtype for dtype in dtypes if dtype.startswith(("f", "bf"))]
        return flops, min(floats or dtypes, key=lambda dtype: int(_DIGITS.findall(dtype)[0]))

    def _bytes(self, instruction: Instruction, computation: Computation) -> int:
        operands = [computation.instructions[name] for name in instruction.operands]
        if instruction.opcode == "fusion":
            callee = self.module.computations[instruction.callees["calls"][0]]
            read = sum(
                min(_hbm_bytes(operand.shape), self._read_bytes(callee, i))
                for i, operand in enumerate(operands)
            )
            return read + _written_bytes(callee, callee.root, instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * _hbm_bytes(operands[1].shape)
        is_start = instruction.opcode.endswith("-start")
        if instruction.opcode.removesuffix("-start") in _SLICES:
            # Where it has a start, its result repeats the operands, before the output.
            sizes = [size for _, size in array_bytes(instruction.shape)]
            read = min(_hbm_bytes(operands[0].shape), sizes[len(operands) if is_start else 0])
            repeated = sum(_hbm_bytes(o.shape) for o in operands) if is_start else 0
            return read + _hbm_bytes(instruction.shape) - repeated
        if is_start:
            return _hbm_bytes(instruction.shape)  # Likewise.
        return sum(_hbm_bytes(o.shape) for o in operands) + _hbm_bytes(instruction.shape)

    def _read_bytes(self, callee: Computation, index: int) -> int:
        """Bytes that a fusion reads of an operand: of one that it only slices, the slices."""
        parameter = next(
            i
            for i in callee.instructions.values()
            if i.opcode == "parameter" and i.operand_text.strip() == str(index)
        )
        names, read = [parameter.name], 0
        while names:
            name = names.pop()
            for user in callee.instructions.values():
                if name not in user.operands or user.opcode in _PASSED_ON:
                    continue
                if user.opcode == "bitcast":
                    names.append(user.name)
                elif user.opcode == "fusion":
                    inner = self.module.computations[user.callees["calls"][0]]
                    places = (i for i, operand in enumerate(user.operands) if operand == name)
                    read += sum(self._read_bytes(inner, i) for i in places)
                elif user.opcode in _SLICES:
                    read += _hbm_bytes(user.shape)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    return _hbm_bytes(parameter.shape)
        return read


def _phase(scope: str) -> str:
    head = scope.partition("/")[0].partition(" ")[0]
    return head if head in ("forward", "backward", "recompute", "optimizer") else "other"


def _hbm_bytes(shape: str) -> int:
    return sum(size for _, size in array_bytes(_ON_CHIP.sub("", shape)))


def _written_bytes(callee: Computation, root: Instruction, shape: str) -> int:
    """Bytes that a fusion writes: into an array that it updates in place, the update."""
    if _hbm_bytes(shape) == 0:
        return 0
    if root.opcode == "tuple":
        parts = [callee.instructions[name] for name in root.operands]
        return sum(_written_bytes(callee, part, part.shape) for part in parts)
    if root.opcode == "parameter" or root.opcode in COLLECTIVES:
        return 0
    if root.opcode == "bitcast":
        return _written_bytes(callee, callee.instructions[root.operands[0]], shape)
    if root.opcode == "dynamic-update-slice":
        return _hbm_bytes(callee.instructions[root.operands[1]].shape)
    return _hbm_bytes(shape)
