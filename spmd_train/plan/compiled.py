"""A compiled train step, and what is read out of it."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from typing import Any

import jax

from spmd_train.inspect.collectives import Collective, count_collectives
from spmd_train.inspect.memory import memory_report
from spmd_train.parallel.mesh import slices_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompiledStep:
    """What the compiler made of a train step.

    Attributes:
        hlo_text: the optimized program.
        memory: bytes per device, as `memory_report` gives them.
        collectives: every collective a step executes.
        lower_seconds: tracing and lowering.
        compile_seconds: XLA's part; near nothing where the compilation cache had it.
    """

    hlo_text: str
    memory: dict[str, Any]
    collectives: list[Collective]
    lower_seconds: float
    compile_seconds: float


class DoesNotFitError(Exception):
    """The compiler refuses a program because it takes more memory than a device has."""

    def __init__(self, message: str) -> None:
        """Reads from the compiler's message how much the program needs."""
        super().__init__(message)
        self.needed_bytes = _needed_bytes(message)


_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_USED = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm|temporaries \(([\d.]+)([KMGT])\)")


def _needed_bytes(message: str) -> int | None:
    """`Used 20.11G of 15.75G hbm`; None if the message does not tell."""
    match = _USED.search(message)
    if match is None:
        return None
    amount, unit = (match[1], match[2]) if match[1] else (match[3], match[4])
    return int(float(amount) * _UNITS[unit])


def compile_step(program: Any, *, options: Mapping[str, Any] | None = None) -> CompiledStep:
    """Compiles a program's train step for its mesh, whose devices need not exist.

    Args:
        program: a `Program`; anything with `lower_train_step()` and `mesh`.
        options: XLA's, by name.

    Returns:
        What the compiler made.

    Raises:
        DoesNotFitError: it takes more memory than a device has, and the compiler says so.
    """
    begin = time.monotonic()
    lowered: jax.stages.Lowered = program.lower_train_step()
    middle = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=dict(options) if options else None)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFitError(str(error)) from error
    end = time.monotonic()
    text = compiled.as_text()
    assert text is not None, "the compiler gives no HLO text"
    return CompiledStep(
        hlo_text=text,
        memory=memory_report(compiled),
        collectives=count_collectives(
            text, axis_sizes=program.mesh.shape, slices=slices_of(program.mesh.devices.flat)
        ),
        lower_seconds=middle - begin,
        compile_seconds=end - middle,
    )
