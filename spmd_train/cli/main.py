"""`spmd-train VERB`: reads the command line and the config, starts JAX, runs the verb.

Imports no JAX itself: help, and the user's mistakes, are answered at once.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import logging
import os
import platform
import sys
import textwrap
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from spmd_train.cli.allocator import choose_allocator
from spmd_train.cli.config_flags import split_overrides, unknown_argument
from spmd_train.cli.flags import Flag
from spmd_train.cli.verbs import VERBS, Verb
from spmd_train.config import ConfigError, load_config, parse

_PROG = "spmd-train"
_GROUPS = {
    "inspect": "show what XLA will do, without training",
    "convert": "Hugging Face checkpoints in and out",
    "checkpoints": "what is there, and whether it is whole",
}
_OVERRIDES = """\
any key of the config:
  --config.a.b=VALUE    sets the key a.b; `spmd-train inspect config` lists them all
"""
_EXIT_CODES = """\
exit codes:
  0    done
  1    not as it should be: a checkpoint is damaged, a run gave up; logged
  2    a mistake in the command line, the config or the data: one message, nothing written
  3    plan: it does not fit the target
  75   told to stop (SIGTERM) and saved: the same command line goes on
  130  interrupted; once: saved as above, twice: at once
  else a fault of the program, with a traceback

Answers go to standard output, logs to standard error.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: its words, without the program's name; None: those of this process.

    Returns:
      The exit code: 0 done, 2 the user's mistake, 130 interrupted, or what the verb says.
    """
    started = time.time()
    if argv is None:
        choose_allocator()
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("spmd_train").setLevel(logging.INFO)
    try:
        args = _read_command_line(sys.argv[1:] if argv is None else argv)
        args.started = started
        verb: Verb = args.verb
        if verb.uses_devices:
            cluster = importlib.import_module("spmd_train.cluster")
            cluster.start(simulate_devices=args.simulate_devices)
            if verb.uses_processes:
                place = (args.coordinator_address, args.num_processes, args.process_id)
                cluster.connect(cluster.Place(*place))
        code = importlib.import_module(verb.module).run(args)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"{_PROG}: {error}", file=sys.stderr)
        _abandon(2)
        return 2
    except KeyboardInterrupt:
        print(f"{_PROG}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our answer has left (`| head`); Python's own flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        _abandon(1, error)
        raise


def _abandon(code: int, error: Exception | None = None) -> None:
    """Ends this process without waiting for the others of its run, if there are any."""
    cluster = sys.modules.get("spmd_train.cluster")
    if cluster is not None and cluster.connected():
        if error is not None:
            traceback.print_exception(error)
        cluster.abandon(code)


def _read_command_line(argv: Sequence[str]) -> argparse.Namespace:
    """Reads flags and config; `args.config` is the parsed config, `args.verb` the verb."""
    end = argv.index("--") if "--" in argv else len(argv)
    overrides, words = split_overrides(argv[:end])
    args, unknown = _make_parser().parse_known_args(words)
    verb: Verb = args.verb
    prog = " ".join((_PROG, *verb.words))
    changes: list[tuple[str, str]] = []
    if verb.takes_diff:
        changes, unknown = split_overrides(unknown, prefix="--diff.")
    if unknown:
        flags = [flag.name for flag in verb.flags]
        prefixes = ["config"] * verb.takes_config + ["diff"] * verb.takes_diff
        raise ConfigError(unknown_argument(unknown[0], flags=flags, prefixes=prefixes, prog=prog))
    args.command = list(argv[end + 1 :])
    if bool(args.command) != verb.takes_command:
        told = (
            "needs -- and the verb to run after its flags" if verb.takes_command else "takes no --"
        )
        raise ConfigError(f"{prog} {told}; see {prog} --help")
    # Here, not by argparse, which would not look at misspelt flags when one is missing.
    missing = [f for f in verb.flags if f.required and getattr(args, f.name) is None]
    if missing:
        names = " and ".join(f.metavar if f.positional else f"--{f.name}" for f in missing)
        raise ConfigError(f"{names} must be given; see {prog} --help")
    if not verb.takes_config:
        if overrides:
            raise ConfigError(f"--config.{overrides[0][0]}: {prog} reads no config")
        return args
    for flag in verb.flags:
        if flag.config_key and (text := vars(args).pop(flag.name)) is not None:
            overrides.append((flag.config_key, text))
    if args.config is None:
        path = args.workdir / "config.json"
        if not path.exists():
            raise ConfigError(f"--workdir={args.workdir}: holds no run, for want of a config.json")
        args.config = str(path)
    config = parse(load_config(args.config, overrides))
    if verb.takes_diff:
        _read_second_config(args, overrides, changes)
    args.config = config
    return args


def _read_second_config(
    args: argparse.Namespace, overrides: list[tuple[str, str]], changes: list[tuple[str, str]]
) -> None:
    """The config to compare with, in `args.diff`, None if there is none; names in `args.names`."""
    if args.diff is None and not changes:
        return
    name = args.diff or args.config
    words = [f"{path}={text}" for path, text in changes]
    args.names = (args.config, " ".join([name, *words]))
    try:
        args.diff = parse(load_config(name, [*overrides, *changes]))
    except ConfigError as error:
        told = " ".join([f"--diff={name}", *(f"--diff.{word}" for word in words)])
        raise ConfigError(f"the second program ({told}): {error}") from error


class _Parser(argparse.ArgumentParser):
    """Raises the user's mistakes, so that all are told in the same way."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


class _Version(argparse.Action):
    """Prints versions; looks them up only when asked, which takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        versions = [f"{name} {_version(name)}" for name in (_PROG, "jax", "flax")]
        print(", ".join([*versions, f"Python {platform.python_version()}"]))
        parser.exit()


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=_PROG,
        description="One JAX program, any mesh: train on a laptop, a GPU cluster or a TPU pod.",
        epilog=f"example:\n  {VERBS[0].example}\n\nspmd-train VERB --help tells a verb's flags.\n\n"
        + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print versions and exit")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    groups = {}
    for verb in VERBS:
        overrides = _OVERRIDES if verb.takes_config else ""
        *group, word = verb.words
        at = verbs
        if group:
            (name,) = group
            if name not in groups:
                sub = verbs.add_parser(name, help=_GROUPS[name], description=_GROUPS[name])
                groups[name] = sub.add_subparsers(title="verbs", metavar="WHAT", required=True)
            at = groups[name]
        _add_flags(
            at.add_parser(
                word,
                help=verb.summary,
                usage=_usage(verb),
                description=textwrap.fill(verb.about, 90),
                epilog=f"{overrides}\nexample:\n  {verb.example}\n\n{_EXIT_CODES}",
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            ),
            verb,
        )
    return parser


def _usage(verb: Verb) -> str:
    needed = [_usage_of(flag) for flag in verb.flags if flag.required]
    free = [f"[{_usage_of(flag)}]" for flag in verb.flags if not flag.required]
    words = [_PROG, *verb.words, *needed, *free]
    words += ["[--config.a.b=VALUE ...]"] * verb.takes_config
    words += ["[--diff.a.b=VALUE ...]"] * verb.takes_diff + ["-- VERB ..."] * verb.takes_command
    return textwrap.fill(" ".join(words), 90, subsequent_indent=" " * 11, break_on_hyphens=False)


def _usage_of(flag: Flag) -> str:
    if flag.positional:
        return flag.metavar
    return f"--{flag.name}={flag.metavar}" if flag.metavar else f"--{flag.name}"


def _add_flags(parser: argparse.ArgumentParser, verb: Verb) -> None:
    for flag in verb.flags:
        if not flag.metavar:
            parser.add_argument(f"--{flag.name}", action="store_true", help=flag.help)
            continue
        if flag.positional:
            parser.add_argument(
                flag.name, metavar=flag.metavar, type=flag.type, nargs="?", help=flag.help
            )
            continue
        told = f"{flag.help} (default: {flag.config_key} of the config)"
        parser.add_argument(
            f"--{flag.name}",
            metavar=flag.metavar,
            type=flag.type,
            default=flag.default,
            action="append" if flag.repeats else "store",
            help=told if flag.config_key else flag.help,
        )
    parser.set_defaults(verb=verb)
