"""What has changed since a checkpoint was made: versions, code, data, config."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from spmd_train.config import CheckpointConfig, ConfigError

log = logging.getLogger(__name__)

FREE = re.compile(
    r"(mesh|sharding|pipeline|context|observe|plan|sample|checkpoint)\..*"
    r"|precision"
    r"|optimizer\.offload"
    r"|model\.(attention|remat(_saved|_offloaded)?|scan_unroll)|moe\.exchange_factor|loss\.chunk_tokens"
    r"|data\.(cache_dir|prefetch|num_threads|eval_.*)"
    r"|train\.(log_every|eval_every|checkpoint_every|log_examples|check_replicas_every"
    r"|grad_accumulation|max_device_batch|bad_step|max_bad_steps|spike_factor)"
)
"""Keys that do not change what is learnt, but for float noise: where and how fast it is computed,
what is kept and told. (What `precision` sets, it sets in keys of their own.)"""

_DECAYING = ("cosine", "linear")


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Compares two configs.

    Args:
        saved: the checkpoint's, as `config.to_dict` made it.
        now: that of this run, likewise.

    Returns:
        Sentences: keys that change what is learnt, and those that may change freely. A key that
        only one of them has (other versions of this project) is told if it is not free.
    """
    old, new = _flat(saved), _flat(now)
    free = FREE
    if not _ends_with_the_run(new) and not _ends_with_the_run(old):
        free = re.compile(FREE.pattern + r"|train\.num_steps")
    maths: list[str] = []
    harmless: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        one, other = old.get(key, "(no such key)"), new.get(key, "(no such key)")
        if one != other:
            told = harmless if free.fullmatch(key) else maths
            told.append(f"config.{key}: {one!r} -> {other!r}")
    return maths, harmless


def _ends_with_the_run(config: Mapping[str, Any]) -> bool:
    """Whether the learning rate's last step is the run's, so that a longer run is another."""
    name = config.get("optimizer.schedule.name")
    return name == "wsd" or (name in _DECAYING and not config.get("optimizer.schedule.decay_steps"))


def check_drift(
    meta: Mapping[str, Any],
    *,
    config: Mapping[str, Any],
    facts: Mapping[str, str],
    policy: CheckpointConfig,
    tell: bool = True,
) -> None:
    """Says what differs from a checkpoint's making, or refuses to go on from it.

    Args:
        meta: kept beside the checkpoint: `config`, `made_by` and the `facts` of `data`.
        config: of this run, as `config.to_dict` makes it.
        facts: versions and data of this run, by name.
        policy: `on_drift`.
        tell: whether this process does the telling.

    Raises:
        ConfigError: something differs that changes what is learnt, and the policy is `refuse`.
    """
    if policy.on_drift == "ignore":
        return
    made_by = meta.get("made_by", {}) | meta.get("data", {}).get("facts", {})
    told = [
        f"{name}: {made_by[name]} -> {facts[name]}"
        for name in sorted(made_by)
        if name in facts and made_by[name] != facts[name]
    ]
    maths, harmless = changes(meta.get("config", config), config)
    told += maths
    if told and policy.on_drift == "refuse":
        raise ConfigError(
            "checkpoint.on_drift=refuse, and this run is not what made the checkpoint:\n  "
            + "\n  ".join(told)
            + "\ngo back to that, or set checkpoint.on_drift to warn; nothing was loaded"
        )
    if told and tell:
        log.warning("not the same as when the checkpoint was made:\n  %s", "\n  ".join(told))
    if harmless and tell:
        log.info("changed since the checkpoint, freely: %s", "; ".join(harmless))


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, Mapping):
            flat[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return flat
