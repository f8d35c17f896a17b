"""From a `ConfigDict` to the frozen dataclasses of the schema, once, and back to JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spmd_train.config.checks import conflicts, precision_conflicts
from spmd_train.config.errors import ConfigError
from spmd_train.config.keys import Key, join, keys_of, nearest, paths_of, show
from spmd_train.config.precision import with_policy
from spmd_train.config.schema import ExperimentConfig

_MAX_SHOWN = 20
_MAX_DEPTH = 10


def parse(config: ConfigDict | Mapping[str, Any]) -> ExperimentConfig:
    """Checks a config against the schema and freezes it.

    Args:
      config: what `load_config` gave, or `default_config()` edited. A key it lacks has the
        schema's default.

    Returns:
      The config that every other room gets its part of.

    Raises:
      ConfigError: keys that the schema does not know, values of a wrong type or beyond their
        limits, or values that contradict each other. All of them, in one message.
    """
    reader = _Reader()
    said = reader.read_section(ExperimentConfig, config, "")
    experiment = with_policy(said)
    problems = list(reader.problems.values())
    for conflict in (*precision_conflicts(said), *conflicts(experiment)):
        # A key that was refused holds its default here, which is nobody's contradiction.
        if not any(map(reader.has_refused, conflict.values)):
            named = ", ".join(f"{path} = {show(v)}" for path, v in conflict.values.items())
            problems.append(f"{named}: {conflict.message}")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        hidden = len(problems) - _MAX_SHOWN
        rest = [f"and {hidden} more"] if hidden > 0 else []
        raise ConfigError("\n  ".join([f"{count} in the config:", *problems[:_MAX_SHOWN], *rest]))
    return experiment


def to_dict(config: ExperimentConfig) -> dict[str, Any]:
    """The config as nested dicts of JSON's own types, in the schema's order."""
    return dataclasses.asdict(config)


def to_json(config: ExperimentConfig) -> str:
    """The config as the text of a run's `config.json`; the same config gives the same text."""
    return json.dumps(to_dict(config), indent=2, allow_nan=False) + "\n"


def _is_mapping(value: Any) -> bool:
    return isinstance(value, ConfigDict | Mapping)


class _Reader:
    """Reads sections; keeps what is wrong, by path, and goes on with the default."""

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}

    def refuse(self, path: str, value: Any, why: str) -> None:
        self.problems[path] = f"{path} = {show(value)}: {why}"

    def has_refused(self, path: str) -> bool:
        return any(path == p or path.startswith(p + ".") for p in self.problems)

    def read_section(self, section: type, data: Any, path: str) -> Any:
        keys = keys_of(section)
        if not _is_mapping(data):
            self.refuse(path, data, f"must be a section of the keys {', '.join(keys)}")
            return section()
        values = {}
        for name in data:
            try:
                value = data[name]
            except Exception as error:  # A FieldReference computes its value here.
                self.problems[join(path, name)] = f"{join(path, name)}: has no value: {error}"
                continue
            if name in keys:
                values[name] = self.read(keys[name], value, join(path, name))
            else:
                self.refuse_unknown(section, path, name, value)
        return section(**values)

    def read(self, key: Key, value: Any, path: str) -> Any:
        if key.is_mapping:
            return self.read_mapping(key, value, path)
        if key.is_section:
            return self.read_section(key.type, value, path)
        try:
            return key.accept(value)
        except ValueError as error:
            self.refuse(path, value, str(error))
            return key.default

    def read_mapping(self, key: Key, data: Any, path: str) -> dict[str, Any]:
        if not _is_mapping(data):
            self.refuse(path, data, f"must be {key.allowed}")
            return {}
        entry = dataclasses.replace(key, is_mapping=False, default="")
        entries = {}
        for name in data:
            if isinstance(name, str) and name and name.isprintable():
                entries[name] = self.read(entry, data[name], join(path, name))
            else:
                self.refuse(join(path, name), data[name], "its name must be printable text")
        # The order of flags must not decide what a run sees; that of patterns is the user's.
        return dict(sorted(entries.items())) if entry.is_section else entries

    def refuse_unknown(self, section: type, path: str, name: Any, value: Any) -> None:
        where = path
        for _ in range(_MAX_DEPTH):  # Down to what the user wrote: a.b.c of {"a": {"b": {"c": 3}}}.
            is_plain = isinstance(name, str) and "." not in name and len(name) < 100
            where = join(where, name if is_plain else show(name))
            if not _is_mapping(value) or len(value) != 1:
                break
            ((name, value),) = value.items()
        if len(self.problems) >= _MAX_SHOWN:  # Not shown; spare the search.
            self.refuse(where, value, "there is no such key")
            return
        known = [*paths_of(section, path and path + "."), *paths_of(ExperimentConfig)]
        self.refuse(where, value, f"there is no such key; the nearest is {nearest(where, known)}")
