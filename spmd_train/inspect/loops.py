"""How often a loop of a compiled program runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from spmd_train.inspect.hlo import Computation, Instruction, Module

_KNOWN = re.compile(r"known_trip_count\W+n\W+(\d+)")

# A whole number that depends on a loop's state: a constant, and a coefficient for each element of
# the carried tuple. Inside a fusion the parameters are looked up with an _Argument instead.
_Linear = tuple[int, Mapping[int, int]]
_Argument = Callable[[int], "_Linear | None"]
_FORWARDING = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "opt-barrier")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How many times the body of a `while` in `computation` runs; None where the text cannot tell.

    The compiler's own `known_trip_count` if it is there. Otherwise the condition must compare two
    integers that change by a constant per iteration from constant starts, as those that `lax.scan`
    and `lax.fori_loop` make: then the count follows from start, step and bound.
    """
    if known := _KNOWN.search(loop.attributes.get("backend_config", "")):
        return int(known[1])
    condition, body = (module.computations[loop.callees[k][0]] for k in ("condition", "body"))
    comparison = _comparison(module, condition, condition.root, None)
    if comparison is None:
        return None
    direction, left, right = comparison
    distance = _combine(left, right, -1)
    start, step = distance[0], 0
    for index, coefficient in distance[1].items():
        first = _tuple_element(module, computation, loop.operands[0], index)
        following = _tuple_element(module, body, body.root.name, index)
        if first is None or first[1] or following is None or following[1] != {index: 1}:
            return None
        start += coefficient * first[0]
        step += coefficient * following[0]
    return _iterations(direction, start, step)


def _iterations(direction: str, start: int, step: int) -> int | None:
    """Steps of `start, start + step, ...` until it is no longer (direction) 0."""
    if direction in ("GT", "GE"):
        direction, start, step = {"GT": "LT", "GE": "LE"}[direction], -start, -step
    if direction == "LE":
        direction, start = "LT", start - 1
    if direction == "LT" and start >= 0:
        return 0
    if direction == "LT" and step > 0:
        return math.ceil(-start / step)
    if direction == "NE" and step and start % step == 0 and -start // step >= 0:
        return -start // step
    return None


def _linear(
    module: Module, computation: Computation, name: str, argument: _Argument | None
) -> _Linear | None:
    """The value of a scalar as a linear form in the elements of the computation's tuple."""
    instruction = computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands

    def operand(i: int) -> _Linear | None:
        return _linear(module, computation, operands[i], argument)

    if opcode == "constant":
        literal = re.fullmatch(r"-?\d+", instruction.operand_text)
        return (int(literal[0]), {}) if literal else None
    if opcode in _FORWARDING:
        return operand(0)
    if opcode in ("add", "subtract", "multiply"):
        left, right = operand(0), operand(1)
        if left is None or right is None:
            return None
        if opcode != "multiply":
            return _combine(left, right, 1 if opcode == "add" else -1)
        if left[1] and right[1]:
            return None
        (factor, _), form = (right, left) if left[1] else (left, right)
        return _combine((0, {}), form, factor)
    if opcode == "parameter" and argument is not None:
        return argument(int(operands[0]))
    if opcode == "get-tuple-element" and argument is None:
        return _tuple_element(
            module, computation, operands[0], int(instruction.attributes["index"])
        )
    if opcode in ("fusion", "call"):
        callee = module.computations[next(iter(instruction.callees.values()))[0]]
        return _linear(module, callee, callee.root.name, operand)
    return None


def _tuple_element(
    module: Module, computation: Computation, name: str, index: int
) -> _Linear | None:
    """Element `index` of a tuple: the carried state itself, or what a `tuple` was made from."""
    instruction = computation.instructions[name]
    if instruction.opcode == "parameter":
        return 0, {index: 1}
    if instruction.opcode == "tuple":
        return _linear(module, computation, instruction.operands[index], None)
    if instruction.opcode in _FORWARDING:
        return _tuple_element(module, computation, instruction.operands[0], index)
    return None


def _comparison(
    module: Module, computation: Computation, root: Instruction, argument: _Argument | None
) -> tuple[str, _Linear, _Linear] | None:
    """Direction and both sides of the comparison that a loop's condition returns."""

    def operand(i: int) -> _Linear | None:
        return _linear(module, computation, root.operands[i], argument)

    if root.opcode == "compare":
        left, right = operand(0), operand(1)
        return (
            None if left is None or right is None else (root.attributes["direction"], left, right)
        )
    if root.opcode == "fusion":
        callee = module.computations[root.callees["calls"][0]]
        return _comparison(module, callee, callee.root, operand)
    if root.opcode in _FORWARDING:
        inner = computation.instructions[root.operands[0]]
        return _comparison(module, computation, inner, argument)
    return None


def _combine(left: _Linear, right: _Linear, factor: int) -> _Linear:
    """left + factor * right."""
    coefficients = dict(left[1])
    for index, coefficient in right[1].items():
        coefficients[index] = coefficients.get(index, 0) + factor * coefficient
    return left[0] + factor * right[0], {i: c for i, c in coefficients.items() if c}
