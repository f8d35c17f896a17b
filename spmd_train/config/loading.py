"""From a `--config` flag and its overrides to a `ConfigDict`."""

from __future__ import annotations

import contextlib
import inspect
import json
import pathlib
import sys
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any, cast

from ml_collections import ConfigDict, FrozenConfigDict

from spmd_train.config import schema
from spmd_train.config.errors import ConfigError
from spmd_train.config.keys import keys_of
from spmd_train.config.precision import refuse_contradiction

_MAX_DEPTH = 20


def default_config() -> ConfigDict:
    """The schema's defaults, for a config file to edit.

    It checks nothing while it is edited: `parse` judges the whole, and names every mistake.
    """
    return _default_section(schema.ExperimentConfig)


def _default_section(section: type) -> ConfigDict:
    keys = keys_of(section)
    # A plain dict given to a mapping may have dots in its names (`sharding.overrides`), which a
    # ConfigDict made by conversion would refuse.
    holds_paths = any(key.is_mapping and key.type is str for key in keys.values())
    config = ConfigDict(type_safe=False, convert_dict=not holds_paths)
    for name, key in keys.items():
        if key.is_mapping:
            config[name] = _free_form(key.default)
        else:
            config[name] = _default_section(key.type) if key.is_section else key.default
    return config


def _free_form(data: Any, *, depth: int = 0) -> ConfigDict:
    """A ConfigDict that takes any name and keeps the order."""
    if depth > _MAX_DEPTH:
        raise RecursionError
    config = ConfigDict(type_safe=False, allow_dotted_keys=True, sort_keys=False)
    for name, value in data.items():
        config[name] = _free_form(value, depth=depth + 1) if isinstance(value, dict) else value
    return config


def load_config(flag: str, overrides: Sequence[tuple[str, str]] = ()) -> ConfigDict:
    """Loads the config that a `--config` flag names and lays the overrides over it.

    A config file may build on another: it calls this function itself, with a path made from its
    own `__file__`.

    Args:
      flag: `FILE.py` or `FILE.py:ARG`, whose `get_config()` or `get_config(ARG)` is called, or
        `DIR/config.json`, which is data only and runs no code.
      overrides: pairs of a key's path, such as `train.num_steps`, and its new value as text.

    Returns:
      The config, not yet checked; `parse` does that.

    Raises:
      ConfigError: there is no such file, the file fails, an override goes through a value, or it
        contradicts the config's `precision`.
    """
    file, colon, arg = flag.partition(".py:")
    if colon or flag.endswith(".py"):
        config = _run_file(pathlib.Path(file + ".py" if colon else flag), arg if colon else None)
    elif flag.endswith(".json"):
        config = _read_json(pathlib.Path(flag))
    else:
        raise ConfigError(
            f"--config={flag}: must be FILE.py, FILE.py:ARG (see configs/) or, of a run that was "
            "started before, DIR/config.json"
        )
    with config.ignore_type():
        for path, text in overrides:
            _override(config, schema.ExperimentConfig, path, text, path=path)
    for path, text in overrides:
        refuse_contradiction(config, path, text)
    return config


def _read(path: pathlib.Path) -> str:
    if not path.exists() and path.parts[:1] == ("configs",):
        # Outside a checkout the project's own configs are where `pip install` put them.
        installed = pathlib.Path(sys.prefix, "share", "spmd-train", *path.parts)
        path = installed if installed.exists() else path
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"--config={path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path.
        raise ConfigError(f"--config={path}: cannot be read: {error}") from None


def _run_file(path: pathlib.Path, arg: str | None) -> ConfigDict:
    """Calls a config file's get_config; whatever goes wrong in it is the file's mistake."""
    source = _read(path)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Standard output is for the answer.
            exec(compile(source, str(path), "exec"), module.__dict__)
            get_config = module.__dict__.get("get_config")
            if not callable(get_config):
                raise ConfigError(f"{path}: has no function get_config(arg='')")
            if arg is not None and not inspect.signature(get_config).parameters:
                raise ConfigError(f"{path}: its get_config takes no argument, but got :{arg}")
            config = get_config() if arg is None else get_config(arg)
        if isinstance(config, FrozenConfigDict):
            config = cast(ConfigDict, config.as_configdict())
        if isinstance(config, ConfigDict) and config.is_locked:
            config.unlock()
    except ConfigError:
        raise
    except Exception as error:
        lines = [
            f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)
        ]
        if isinstance(error, SyntaxError):
            lines = [error.lineno]
        where = f"{path}:{lines[-1]}" if lines else str(path)
        raise ConfigError(f"{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"{path}: get_config must return an ml_collections.ConfigDict, such as "
            f"spmd_train.config.default_config() makes, but gave a {type(config).__name__}"
        )
    return config


def _read_json(path: pathlib.Path) -> ConfigDict:
    text = _read(path)
    try:
        data = json.loads(text)
        if isinstance(data, dict):
            return _free_form(data)
    except RecursionError:
        raise ConfigError(f"--config={path}: is nested too deeply for a config") from None
    except ValueError as error:
        raise ConfigError(f"--config={path}: is not JSON: {error}") from None
    raise ConfigError(f"--config={path}: must be a JSON object, but holds a {type(data).__name__}")


def _override(node: ConfigDict, section: type | None, rest: str, text: str, *, path: str) -> None:
    """Sets one key from a flag's text, converted to the type that the schema declares.

    What the schema does not know is set as text, for `parse` to refuse with everything else.

    Args:
      node: the section to set it in.
      section: its dataclass; None where the schema knows no such section.
      rest: the key's path from here.
      text: the flag's value.
      path: the key's whole path.
    """
    name, _, below = rest.partition(".")
    key = keys_of(section).get(name) if section else None
    if not below:
        node[name] = text if key is None else key.from_text(text)
        return
    child = _child(node, name, path=path)
    if key is None or not key.is_mapping:
        node[name] = child
        _override(child, key.type if key and key.is_section else None, below, text, path=path)
        return
    entries = _free_form(child)
    node[name] = entries
    # Names of the user's own may have dots; the keys of a section below them have none.
    entry, dot, leaf = below.rpartition(".") if key.type is not str else ("", "", "")
    if dot:
        source = _child(entries, entry, path=path)
        entries[entry] = source
        _override(source, key.type, leaf, text, path=path)
    else:
        entries[below] = text


def _child(node: ConfigDict, name: str, *, path: str) -> ConfigDict:
    child = node.get(name, {})
    if isinstance(child, ConfigDict):
        return child
    if isinstance(child, Mapping):
        return _free_form(child)
    raise ConfigError(f"--config.{path}: {name} is a value, with no keys below it")
