"""The flags that argparse cannot know: `--config.a.b=VALUE`, and misspelt ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from spmd_train.config import ConfigError, ExperimentConfig
from spmd_train.config.keys import nearest, paths_of


def split_overrides(
    argv: Sequence[str], *, prefix: str = "--config."
) -> tuple[list[tuple[str, str]], list[str]]:
    """Takes a config's overrides out of a command line.

    Args:
      argv: the command line, without the program's name.
      prefix: what they begin with.

    Returns:
      Pairs of a key's path and its text, in order; and the rest of the command line.

    Raises:
      ConfigError: an override has no value.
    """
    overrides, rest = [], []
    for word in argv:
        if not word.startswith(prefix):
            rest.append(word)
            continue
        path, equals, text = word.removeprefix(prefix).partition("=")
        if not equals:
            raise ConfigError(f"{word}: has no value; write {word}=VALUE, without spaces")
        overrides.append((path, text))
    return overrides, rest


def unknown_argument(
    word: str, *, flags: Collection[str], prefixes: Collection[str], prog: str
) -> str:
    """What to say of an argument that a verb does not take.

    Args:
      word: the argument.
      flags: names of the verb's flags, without the dashes.
      prefixes: what the verb takes before a config key's path: `config`, `diff`.
      prog: how the verb was called, as in `spmd-train train`.
    """
    if not word.startswith("-"):
        return f"unexpected argument {word!r}; see {prog} --help"
    name = word.partition("=")[0].lstrip("-").replace("-", "_")
    paths = list(paths_of(ExperimentConfig))
    known = [*flags, *(f"{prefix}.{path}" for prefix in prefixes for path in paths)]
    if not known:
        return f"no such flag: {word}; see {prog} --help"
    return f"no such flag: {word}; the nearest is --{nearest(name, known)}; see {prog} --help"
