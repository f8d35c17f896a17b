"""Precision policies: one name for several keys. docs/precision.md tells what each costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from spmd_train.config.errors import ConfigError
from spmd_train.config.schema import CUSTOM, PRECISIONS, ExperimentConfig

_BF16 = {"model.compute_dtype": "bfloat16"}
_POLICIES: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bf16": _BF16,
    "bf16_moments": {**_BF16, "optimizer.state_dtype": "bfloat16"},
    "bf16_params": {
        **_BF16,
        "optimizer.state_dtype": "bfloat16",
        "model.param_dtype": "bfloat16",
        "optimizer.stochastic_rounding": True,
    },
    "int8": {**_BF16, "model.quantization": "int8"},
    "fp8": {**_BF16, "model.quantization": "fp8"},
}
assert (CUSTOM, *_POLICIES) == PRECISIONS

_DEFAULTS: Mapping[str, Any] = {
    f"{section}.{name}": getattr(getattr(ExperimentConfig(), section), name)
    for section, names in {
        "model": ("param_dtype", "compute_dtype", "quantization"),
        "optimizer": ("state_dtype", "stochastic_rounding"),
    }.items()
    for name in names
}
"""The keys that a policy sets."""


def policy(name: str) -> dict[str, Any]:
    """What a policy sets: a key's whole path to its value. `custom` sets nothing."""
    return {} if name == CUSTOM else {**_DEFAULTS, **_POLICIES[name]}


def contradicted(config: ExperimentConfig) -> dict[str, Any]:
    """Keys that were set to something else than `precision` sets: path to value."""
    values = {path: _value(config, path) for path in _DEFAULTS}
    wanted = policy(config.precision)
    return {
        path: value
        for path, value in values.items()
        if value not in (_DEFAULTS[path], wanted.get(path, value))
    }


def refuse_contradiction(config: Any, path: str, text: str) -> None:
    """Refuses a flag for a key that the config's policy sets to something else.

    Args:
        config: a ConfigDict, not yet parsed, with the flag laid over it.
        path: the key.
        text: the flag's value.

    Raises:
        ConfigError: it is not that of the policy, be it the schema's default.
    """
    name = config.get("precision", CUSTOM)
    if path not in _DEFAULTS or name not in PRECISIONS[1:]:
        return
    wanted = policy(name)[path]
    if text.lower() != str(wanted).lower():
        raise ConfigError(f"--config.{path}={text}: {cure(name, {path: wanted})}")


def cure(name: str, wanted: Mapping[str, Any]) -> str:
    """What to do about keys that contradict a policy."""
    said = " and ".join(f"{path}={value}" for path, value in wanted.items())
    return f"precision={name} sets {said}; leave that out, or set precision={CUSTOM}"


def with_policy(config: ExperimentConfig) -> ExperimentConfig:
    """The config with the keys set that its `precision` names."""
    changes: dict[str, dict[str, Any]] = {}
    for path, value in policy(config.precision).items():
        section, _, name = path.partition(".")
        changes.setdefault(section, {})[name] = value
    sections = {
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in changes.items()
    }
    return dataclasses.replace(config, **sections)


def _value(config: ExperimentConfig, path: str) -> Any:
    section, _, name = path.partition(".")
    return getattr(getattr(config, section), name)
