"""Files that a flag names."""

from __future__ import annotations

import pathlib

from spmd_train.config import ConfigError


def check_folder(path: pathlib.Path | None, *, flag: str) -> None:
    """Refuses a file whose folder is not there, before long work is done for it."""
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={path}: there is no folder {path.parent}; make it first")


def write_file(path: pathlib.Path, text: str, *, flag: str) -> None:
    """Writes what was asked for; what keeps it from that is a user error that names the flag."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--{flag}={path}: cannot be written: {error}; name another file with --{flag}"
        ) from error
