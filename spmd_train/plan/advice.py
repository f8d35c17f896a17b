"""The nearest change that makes a config fit: tried, not guessed."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from spmd_train.config import ConfigError, ExperimentConfig, with_values
from spmd_train.plan.answer import Plan
from spmd_train.plan.compiled import DoesNotFitError, compile_step
from spmd_train.plan.sizes import state_bytes

log = logging.getLogger(__name__)

_MOST_TRIES = 3


def advise(
    config: ExperimentConfig,
    *,
    plan: Plan,
    build: Callable[[ExperimentConfig], Any],
    options: Mapping[str, Any],
) -> str:
    """Overrides that make a config fit; nearest first, each compiled before it is named.

    Args:
        config: that does not fit.
        plan: of it.
        build: makes an experiment on the target's devices.
        options: XLA's, to compile with.

    Returns:
        Overrides to paste; a sentence if none of the tried changes suffices.
    """
    tries = 0
    for change in _changes(config, plan):
        try:
            program = build(with_values(config, change)).program
        except ConfigError:
            continue
        state = state_bytes(program.plans)
        if state.parameters + state.optimizer > plan.usable_bytes:
            continue
        text = " ".join(f"--config.{path}={value}" for path, value in change.items())
        log.info("trying %s", text)
        tries += 1
        try:
            step = compile_step(program, options=options)
        except DoesNotFitError:
            step = None
        if step is not None and step.memory["peak_bytes"] <= plan.usable_bytes:
            return text
        if tries == _MOST_TRIES:
            break
    state = plan.state
    least = state.parameters + state.optimizer
    if least > plan.usable_bytes:
        return (
            f"nothing here: parameters and optimizer alone take {least:,} bytes of a device; "
            "more devices, or a larger mesh.fsdp or mesh.tensor"
        )
    return f"not found in {tries} tries; `spmd-train plan --search` looks further"


def _changes(config: ExperimentConfig, plan: Plan) -> Iterator[dict[str, Any]]:
    """Single changes first; what costs least speed before what costs more."""
    mesh = {axis: size for axis, size in plan.mesh.items() if size > 1}
    remat = {} if config.model.remat == "full" else {"model.remat": "full"}
    if config.model.remat == "names":
        remat |= {"model.remat_saved": "", "model.remat_offloaded": ""}
    batch = config.train.global_batch_size
    accumulation = [
        n for n in (2, 4, 8, 16, 32) if n > config.train.grad_accumulation and batch % n == 0
    ]
    # Copies of the whole state are what costs most, so that sharding them comes first.
    copies = mesh.get("data", 1) * mesh.get("replica", 1)
    fsdp = {"mesh.data": 1, "mesh.replica": 1, "mesh.fsdp": copies * mesh.get("fsdp", 1)}
    crosses = any(n > 1 for n in dataclasses.asdict(config.mesh.dcn).values())
    half = plan.usable_bytes // 2
    can_shard = copies > 1 and not crosses
    first = can_shard and plan.state.parameters + plan.state.optimizer > half
    if first:
        yield fsdp
    if remat:
        yield fsdp | remat if first else remat
    if can_shard and not first:
        yield fsdp
    for n in accumulation:
        yield {"train.grad_accumulation": n} | remat
