"""A compiled train step, and what is read out of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from spmd_train.inspect.collectives import Collective, count_collectives
from spmd_train.inspect.memory import memory_report


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


def compile_step(program: Any) -> CompiledStep:
    """Compiles a program's train step for its mesh, whose devices need not exist.

    Args:
        program: a `Program`; anything with `lower_train_step()` and `mesh`.

    Returns:
        What the compiler made.
    """
    begin = time.monotonic()
    lowered: jax.stages.Lowered = program.lower_train_step()
    middle = time.monotonic()
    compiled = lowered.compile()
    end = time.monotonic()
    text = compiled.as_text()
    assert text is not None, "the compiler gives no HLO text"
    return CompiledStep(
        hlo_text=text,
        memory=memory_report(compiled),
        collectives=count_collectives(
            text, axis_sizes=program.mesh.shape, slices=slices_of(program.mesh)
        ),
        lower_seconds=middle - begin,
        compile_seconds=end - middle,
    )


def slices_of(mesh: Mesh) -> Sequence[int]:
    """For each device in mesh order its slice, or where there are none its process (node)."""
    return [
        device.process_index
        if (index := getattr(device, "slice_index", None)) is None
        else int(index)
        for device in mesh.devices.flat
    ]
