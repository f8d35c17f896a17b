"""Reads XLA's HLO text: computations, instructions, shapes.

The text is what `jax.stages.Compiled.as_text()` gives on CPU, GPU and TPU. It is read by its
brackets and strings, not by its lines: an attribute may hold braces, strings and line breaks (a
Pallas kernel's metadata has lines that begin with `}}`). What cannot be read raises `ValueError`:
an instruction that is skipped could be a collective.

Grammar: https://openxla.org/xla/hlo_dumps and `xla/hlo/parser/hlo_parser.cc`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\]\n]', re.DOTALL)
_SEPARATORS = re.compile(r'"(?:[^"\\]|\\.)*"|[(){}\[\],/:]', re.DOTALL)
_HEADER = re.compile(r"\s*(ENTRY\s+)?%?([\w.\-]+)\s*\(")
_ASSIGNMENT = re.compile(r"\s*(ROOT\s+)?%?([\w.\-]+)\s*=\s*")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\]")
_ARRAY_WITH_LAYOUT = re.compile(r"[a-z]\w*\[[^\]]*\](?:\{[^}]*\})?")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLEES = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)
# Parts of JAX's name stack that no user wrote.
_NAMED_CALLS = ("jit", "pjit")
_PLUMBING = re.compile(
    r"while|body|cond|scan|closed_call|core_call|eval_jaxpr|shard_map|pjit|checkpoint|remat2?|"
    r"rematted_computation|custom_[jv]+p_call(_jaxpr)?|branch_\d+_fun|kernel_flops_\d+|"
    r"sequential_vmap|custom_vmap_call"
)
_BITS = {"pred": 8, "token": 0, "opaque": 0}


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One HLO instruction: `name = shape opcode(operand_text), attribute_text`."""

    name: str
    shape: str
    opcode: str
    operand_text: str
    attribute_text: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operands, in order; for a constant or parameter, its literal."""
        parts = split_list(_COMMENT.sub("", self.operand_text))
        return tuple(part.split()[-1].lstrip("%") for part in parts)

    @functools.cached_property
    def attributes(self) -> Mapping[str, str]:
        """Attribute name -> its text."""
        pairs = (part.partition("=") for part in split_list(self.attribute_text))
        return {key.strip(): value for key, _, value in pairs}

    @functools.cached_property
    def callees(self) -> Mapping[str, tuple[str, ...]]:
        """Attribute name -> the computations it names (`body`, `condition`, `calls`, ...)."""
        return {
            key: tuple(
                name.strip().lstrip("%") for name in self.attributes[key].strip("{}").split(",")
            )
            for key in _CALLEES
            if key in self.attributes
        }

    @property
    def op_name(self) -> str:
        """JAX's name stack from the metadata; empty where XLA kept none."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes.get("metadata", ""))
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of instructions in the order they are printed (scheduled)."""

    name: str
    instructions: Mapping[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(i for i in self.instructions.values() if i.is_root)


@dataclasses.dataclass(frozen=True)
class Module:
    """An HLO module; `num_partitions` and `replica_count` are 1 where the text names none."""

    name: str
    computations: Mapping[str, Computation]
    entry: Computation
    num_partitions: int
    replica_count: int

    @property
    def num_instructions(self) -> int:
        """Instructions in the text: the size of the program, loops not multiplied out."""
        return sum(len(c.instructions) for c in self.computations.values())


def parse_hlo(text: str) -> Module:
    """Reads an HLO module.

    Raises:
      ValueError: the text is no HLO module, or a line of it cannot be read.
    """
    header = re.search(r"^HloModule ([\w.\-]+).*$", text, re.MULTILINE)
    if header is None:
        raise ValueError(f"no HloModule in text of {len(text)} characters: {text[:80]!r}")
    computations: dict[str, Computation] = {}
    entry = None
    for is_entry, name, statements in _blocks(text):
        instructions = (_parse_instruction(statement) for statement in statements)
        computations[name] = Computation(name, {i.name: i for i in instructions})
        entry = computations[name] if is_entry else entry
    if entry is None:
        raise ValueError(f"HLO module {header[1]} has no ENTRY computation")
    counts = dict(re.findall(r"\b(num_partitions|replica_count)=(\d+)", header[0]))
    return Module(
        header[1],
        computations,
        entry,
        int(counts.get("num_partitions", 1)),
        int(counts.get("replica_count", 1)),
    )


def array_bytes(shape: str) -> list[tuple[str, int]]:
    """Element type and bytes of each array in a shape, without padding: `[("bf16", 2048), ...]`.

    Types narrower than a byte are packed; tokens hold none.
    """
    arrays = []
    for dtype, dims in _ARRAY.findall(_COMMENT.sub("", shape)):
        sizes = [int(dim.removeprefix("<=")) for dim in dims.split(",") if dim]
        arrays.append((dtype, math.ceil(math.prod(sizes) * _bits(dtype) / 8)))
    return arrays


def split_list(text: str, *, separator: str = ",") -> list[str]:
    """Splits at separators that stand in no bracket and no string; strips; drops empty parts."""
    parts, depth, start = [], 0, 0
    for match in _SEPARATORS.finditer(text):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == separator and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [part for part in map(str.strip, [*parts, text[start:]]) if part]


def clean_op_name(op_name: str) -> tuple[str, str]:
    """The `jax.named_scope` path and the primitive in a name stack of JAX.

    `jit(step)/transpose(jvp(model))/while/body/closed_call/mlp/dot_general` gives
    `("backward/model/mlp", "dot_general")`. The path is led by `forward`, `backward` or `recompute`
    (the forward pass again, under `jax.checkpoint`) where a gradient is taken. Where XLA merged
    instructions, `a/(b/dot:c/dot)`, the paths are joined by ` + `.
    """
    *stack, source = split_list(op_name, separator="/") or [""]
    if source.startswith("(") and source.endswith(")"):
        prefix = "".join(f"{part}/" for part in stack)
        merged = [clean_op_name(prefix + a) for a in split_list(source[1:-1], separator=":")]
        return " + ".join(dict.fromkeys(m[0] for m in merged)), "+".join(
            dict.fromkeys(m[1] for m in merged)
        )
    phase, path = "", []
    for part in stack:
        if "transpose(" in part:
            phase = "backward"
        elif "jvp(" in part and not phase:
            phase = "forward"
        elif part == "rematted_computation":
            phase = "recompute"
        while (call := re.fullmatch(r"(\w+)\((.*)\)", part)) and call[1] not in _NAMED_CALLS:
            part = call[2]
        if part and not call and not _PLUMBING.fullmatch(part):
            path.append(part)
    return "/".join([phase, *path] if phase else path), source


def _blocks(text: str) -> Iterator[tuple[bool, str, list[str]]]:
    """Each computation of a module: whether it is the entry, its name, its statements."""
    header, statements = None, []
    depth = start = 0
    for match in _STRUCTURE.finditer(text):
        token = match[0]
        if token in "([{":
            depth += 1
        elif token in ")]}":
            depth -= 1
        elif token == "\n" and depth <= 1:
            statement = text[start : match.start()]
            start = match.end()
            if header is None:
                if depth == 1 and statement.rstrip().endswith("{"):
                    header = _HEADER.match(statement)
            elif depth == 1:
                if statement.strip():
                    statements.append(statement)
            else:
                yield bool(header[1]), header[2], statements
                header, statements = None, []


def _parse_instruction(statement: str) -> Instruction:
    assignment = _ASSIGNMENT.match(statement)
    if assignment is None:
        raise ValueError(f"cannot read this HLO instruction: {statement[:200]!r}")
    start = assignment.end()
    if statement[start : start + 1] == "(":
        end = _closing(statement, start)
    else:
        array = _ARRAY_WITH_LAYOUT.match(statement, start)
        end = array.end() if array else start
    opcode = _OPCODE.match(statement, end)
    if end == start or opcode is None:
        raise ValueError(f"cannot read this HLO instruction: {statement[:200]!r}")
    close = _closing(statement, opcode.end() - 1)
    return Instruction(
        name=assignment[2],
        shape=statement[start:end],
        opcode=opcode[1],
        operand_text=statement[opcode.end() : close - 1],
        attribute_text=statement[close:].lstrip(", "),
        is_root=bool(assignment[1]),
    )


def _closing(text: str, start: int) -> int:
    """The index after the bracket that closes the one at `start`."""
    depth = 0
    for match in _STRUCTURE.finditer(text, start):
        if match[0] in "([{":
            depth += 1
        elif match[0] in ")]}":
            depth -= 1
            if depth == 0:
                return match.end()
    raise ValueError(f"a bracket is never closed in this HLO instruction: {text[:200]!r}")


def _bits(dtype: str) -> int:
    """Bits of an element: from the number in its name (`bf16`, `s4`, `f8e4m3fn`)."""
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise ValueError(f"HLO element type {dtype!r} has no size that is known here")
    return int(digits[1])
