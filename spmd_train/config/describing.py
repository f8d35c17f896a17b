"""A config told key by key, for `spmd-train inspect config`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from spmd_train.config.keys import join, keys_of
from spmd_train.config.schema import ExperimentConfig


class Description(NamedTuple):
    """One key of a config.

    Attributes:
      path: its whole path, as in `--config.PATH=VALUE`.
      value: its value.
      default: the schema's; None for a name of the user's own choosing.
      is_default: whether the two are the same.
      allowed: its type and limits, in words.
      meaning: what it does.
    """

    path: str
    value: Any
    default: Any
    is_default: bool
    allowed: str
    meaning: str


def describe(config: ExperimentConfig) -> list[Description]:
    """Every key of a config, in the schema's order; mappings one row per name in them."""
    return list(_describe(config, ""))


def _describe(section: Any, path: str) -> Iterator[Description]:
    for name, key in keys_of(type(section)).items():
        where, value = join(path, name), getattr(section, name)
        if key.is_section:
            yield from _describe(value, where)
        elif not key.is_mapping or not value:
            yield Description(where, value, key.default, value == key.default, key.allowed, key.doc)
        elif key.type is str:
            for entry, text in value.items():
                yield Description(join(where, entry), text, None, False, "text", key.doc)
        else:
            for entry, source in value.items():
                yield from _describe(source, join(where, entry))
