"""What runs while an asynchronous collective is under way.

The order of a compiled module's instructions is its schedule: what stands between a start and its
done runs meanwhile. A TPU collective that is spread over fusions goes on only while those that
carry it run; what else stands between them does not count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from spmd_train.inspect.call_tree import COLLECTIVES, Site, async_chain
from spmd_train.inspect.hlo import Computation, Instruction, Module

_CONTROL_FLOW = ("while", "conditional", "call", "async-start")
_SUFFIXES = ("-start", "-update", "-done")


def run_meanwhile(site: Site, module: Module) -> tuple[str, ...]:
    """Names of the instructions between the start and the done of a collective, in order.

    Those in loops, branches and calls count as theirs; collectives do not count.

    Args:
        site: of an asynchronous collective.
        module: that it is in.
    """
    chain = async_chain(site.instruction)
    if chain and site.callers:
        carriers = _carriers(chain, site.computations[1], module)
        return tuple(_kernels(carriers, module))
    for instruction, computation in zip(
        (site.instruction, *site.callers), site.computations, strict=True
    ):
        if instruction.opcode.endswith("-start") or instruction.opcode == "send":
            return tuple(_kernels(_until_done(instruction, computation), module))
    return ()


def _carriers(
    chain: tuple[str | None, ...], computation: Computation, module: Module
) -> Iterator[Instruction]:
    """The fusions that repeat a collective; its start and done compute nothing."""
    for instruction in computation.instructions.values():
        if instruction.opcode == "fusion":
            fused = module.computations[instruction.callees["calls"][0]]
            if any(async_chain(i) == chain for i in fused.instructions.values()):
                yield instruction


def _until_done(start: Instruction, computation: Computation) -> list[Instruction]:
    """What stands between a start and its done; nothing if that is in another computation."""
    under_way, between, started = {start.name}, [], False
    channel = start.attributes.get("channel_id")
    for instruction in computation.instructions.values():
        if not started:
            started = instruction is start
            continue
        if start.opcode == "send":
            # The permutation has ended when its other half, the receive, has.
            done = instruction.opcode == "recv-done"
            done = done and instruction.attributes.get("channel_id") == channel
        else:
            follows = not under_way.isdisjoint(instruction.operands)
            done = follows and instruction.opcode.endswith("-done")
            if follows and instruction.opcode.endswith("-update"):
                under_way.add(instruction.name)
        if done:
            return between
        between.append(instruction)
    return []


def _kernels(instructions: Iterable[Instruction], module: Module) -> Iterator[str]:
    for instruction in instructions:
        opcode = instruction.opcode
        for suffix in _SUFFIXES:
            opcode = opcode.removesuffix(suffix)
        if opcode in COLLECTIVES:
            continue
        if instruction.opcode not in _CONTROL_FLOW:
            yield instruction.name
            continue
        for role, names in instruction.callees.items():
            if role != "condition":
                for name in names:
                    yield from _kernels(module.computations[name].instructions.values(), module)
