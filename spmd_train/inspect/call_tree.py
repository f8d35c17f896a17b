"""Where a compiled program executes collectives: a walk from its entry.

A collective is executed once for each way to reach it: through loops (times their trip count),
branches, fusions, calls and asynchronous computations.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from spmd_train.inspect.hlo import Computation, Instruction, Module
from spmd_train.inspect.loops import trip_count

COLLECTIVES = frozenset(
    (
        "all-reduce",
        "all-gather",
        "reduce-scatter",
        "all-to-all",
        "ragged-all-to-all",
        "collective-permute",
        "collective-broadcast",
    )
)
SEND_PAIRS = re.compile(r'_xla_send_recv_source_target_pairs="?(\{[{}\d,]*\})')
"""Marks a permutation that the GPU compiler split into a send and a receive."""
_BRANCHES = ("branch_computations", "true_computation", "false_computation")
_TPU_SCATTER = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Site:
    """A collective instruction at one place of the call tree.

    `callers` are innermost first; `computations` hold the instruction and each of them.
    """

    op: str
    instruction: Instruction
    count: int | None
    conditional: bool
    callers: tuple[Instruction, ...]
    computations: tuple[Computation, ...]

    @property
    def computation(self) -> Computation:
        """Where the instruction stands."""
        return self.computations[0]


def collective_sites(module: Module) -> Iterator[Site]:
    """Every collective that a run of the module executes, in program order, with how often."""
    started = {
        async_chain(i)
        for computation in module.computations.values()
        for i in computation.instructions.values()
        if _starts_chain(i, computation)
    }
    seen: set[tuple[Any, ...]] = set()

    def visit(
        computation: Computation,
        count: int | None,
        conditional: bool,
        callers: tuple[Instruction, ...],
        outer: tuple[Computation, ...],
    ) -> Iterator[Site]:
        inside = (computation, *outer)
        for instruction in computation.instructions.values():
            if op := _collective_op(instruction, callers):
                chain = async_chain(instruction)
                if chain and chain in started and not _starts_chain(instruction, computation):
                    continue
                if chain and chain not in started:
                    key = (chain, *(c.name for c in callers if c.opcode != "fusion"))
                    if key in seen:
                        continue
                    seen.add(key)
                yield Site(op, instruction, count, conditional, callers, inside)
                continue
            if instruction.opcode.endswith(("-update", "-done")):
                continue  # its start has told it
            for role, names in instruction.callees.items():
                if role == "to_apply" and instruction.opcode.removesuffix("-start") != "call":
                    continue  # the scalar function of a reduction
                times = count
                if count is not None and role in ("body", "condition"):
                    trips = trip_count(module, computation, instruction)
                    once_more = role == "condition"
                    times = None if trips is None else count * (trips + once_more)
                branch = conditional or role in _BRANCHES
                for name in names:
                    callee = module.computations[name]
                    yield from visit(callee, times, branch, (instruction, *callers), inside)

    yield from visit(module.entry, 1, False, (), ())


def _collective_op(instruction: Instruction, callers: tuple[Instruction, ...]) -> str | None:
    """The collective that an instruction executes or starts, if it does."""
    op = instruction.opcode.removesuffix("-start")
    if op == "send" and SEND_PAIRS.search(instruction.attribute_text):
        return "collective-permute"
    if op not in COLLECTIVES:
        return None
    fusion = next((c for c in callers[:1] if c.opcode == "fusion"), None)
    if op == "all-reduce" and fusion and fusion.callees["calls"][0].startswith(_TPU_SCATTER):
        return "reduce-scatter"
    return op


def async_chain(instruction: Instruction) -> tuple[str | None, ...] | None:
    """What names one asynchronous TPU collective that is spread over several fusions.

    Its start, each fusion that computes meanwhile and its done repeat the collective instruction,
    with one channel and one chain id.
    """
    attributes = instruction.attributes
    chain = re.search(r'chain_id="(\w+)"', attributes.get("frontend_attributes", ""))
    if chain or "async_collective_fusion_config" in attributes.get("backend_config", ""):
        return instruction.opcode, attributes.get("channel_id"), chain and chain[1]
    return None


def _starts_chain(instruction: Instruction, computation: Computation) -> bool:
    return instruction.opcode in COLLECTIVES and any(
        instruction.name in user.operands and '"AsyncCollectiveStart"' in user.attribute_text
        for user in computation.instructions.values()
        if user.opcode == "custom-call"
    )
