"""`spmd-train inspect config`: every key of the config, its value and its meaning."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from spmd_train.config import Description, ExperimentConfig, describe, to_dict
from spmd_train.config.keys import keys_of


def run(args: argparse.Namespace) -> int:
    """Prints `args.config`, as a table or, with `args.json`, as one JSON document."""
    rows = describe(args.config)
    if args.json:
        keys = [row._asdict() for row in rows]
        print(json.dumps({"config": to_dict(args.config), "keys": keys}, indent=2))
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in format_table(rows, width=width):
        print(line)
    return 0


def format_table(rows: Sequence[Description], *, width: int | None) -> Iterator[str]:
    """The lines of the table, section by section.

    Args:
      rows: what `describe` gave.
      width: columns to wrap the meanings to; None: a line to a key.
    """
    values = [_text(row.value) for row in rows]
    value_width = min(max(map(len, values)), 16)
    path_width = max(len(row.path) for row in rows)
    indent = path_width + value_width + 6
    changed = sum(not row.is_default for row in rows)
    yield f"{len(rows)} keys; {changed} differ from the schema's default and are marked with *"
    section = None
    for row, value in zip(rows, values, strict=True):
        name, dot, _ = row.path.partition(".")
        if dot and name != section:
            section = name
            yield ""
            yield f"{name}: {keys_of(ExperimentConfig)[name].doc}"
        was = "" if row.is_default or row.default is None else f"; default {_text(row.default)}"
        told = f"{row.meaning} [{row.allowed}{was}]"
        head = (
            f"{' ' if row.is_default else '*'} {row.path:<{path_width}}  {value:<{value_width}}  "
        )
        if width is None or width - indent < 30:
            yield head + told
        else:
            first, *rest = textwrap.wrap(told, width - indent)
            yield head + first
            yield from (" " * indent + line for line in rest)


def _text(value: Any) -> str:
    """A value as a shell takes it in `--config.PATH=VALUE`."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return shlex.quote(value) if value.isprintable() else repr(value)
    return str(value)
