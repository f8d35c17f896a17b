"""The flags of the command line: what one is, how its text is read, and those that verbs share."""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Flag:
    """A flag of a verb.

    Attributes:
      name: as in `--NAME`; the verb finds the value in `args.NAME`.
      help: what it does.
      metavar: what stands for its value in the help; empty: a switch, without a value.
      type: converts its text.
      default: where it is not given.
      required: whether it must be given.
      repeats: whether it may be given several times: the value is a list.
      positional: given as a bare word, without `--NAME=`.
      config_key: the config's key that it overrides; the verb finds the value there.
    """

    name: str
    help: str
    metavar: str = ""
    type: Callable[[str], Any] = str
    default: Any = None
    required: bool = False
    repeats: bool = False
    positional: bool = False
    config_key: str = ""


def at_least(smallest: int) -> Callable[[str], int]:
    """A type of flags: a whole number, at least `smallest`."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = smallest - 1
        if number < smallest:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be a whole number, at least {smallest}"
            )
        return number

    return convert


def _named(text: str, what: str) -> str:
    if not text:  # An unset shell variable; Path("") would be the folder one stands in.
        raise argparse.ArgumentTypeError(f"must name a {what}, but is empty")
    return text


def folder(text: str) -> pathlib.Path:
    """A type of flags: a folder of this machine."""
    return _path(text, "folder")


def file(text: str) -> pathlib.Path:
    """A type of flags: a file of this machine."""
    return _path(text, "file")


def _path(text: str, what: str) -> pathlib.Path:
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a {what} of this machine: mount the bucket (gcsfuse, mountpoint-s3)"
        )
    # A shell leaves the ~ of --flag=~/x.
    return pathlib.Path(os.path.expanduser(_named(text, what)))


def config_name(text: str) -> str:
    """A type of flags: FILE or FILE:ARG."""
    return _named(text, "config")


def stage(text: str) -> str:
    """A type of flags: what `inspect hlo` prints."""
    if text not in ("compiled", "lowered"):
        raise argparse.ArgumentTypeError(f"{text!r} must be compiled or lowered")
    return text


CONFIG = Flag(
    name="config",
    metavar="FILE[:ARG]",
    default="configs/lm_tiny.py",
    help="a Python config file, with an argument for its get_config, or the config.json of a run "
    "(default: configs/lm_tiny.py)",
)
RUN_CONFIG = Flag(
    name="config",
    metavar="FILE[:ARG]",
    help="a config other than the run's own (default: WORKDIR/config.json)",
)
WORKDIR = Flag(
    name="workdir",
    metavar="DIR",
    type=folder,
    required=True,
    help="the run's folder: config.json, checkpoints/, metrics.jsonl, goodput.jsonl, tensorboard/",
)
SIMULATE_DEVICES = Flag(
    name="simulate_devices",
    metavar="N",
    type=at_least(1),
    help="run on N CPU devices, simulated in this process",
)
JSON = Flag(name="json", default=False, help="answer with one JSON document on standard output")
STEP = Flag(
    name="step",
    metavar="N",
    type=at_least(0),
    help="the checkpoint of this step (default: the newest)",
)
PROCESSES = (
    Flag(
        name="coordinator_address",
        metavar="HOST:PORT",
        help="where process 0 is reached; this and the next two are found on TPU pods, SLURM, "
        "OpenMPI, Kubernetes (or in SPMD_TRAIN_COORDINATOR_ADDRESS, ...)",
    ),
    Flag(
        name="num_processes",
        metavar="N",
        type=at_least(1),
        help="processes of this run (or SPMD_TRAIN_NUM_PROCESSES)",
    ),
    Flag(
        name="process_id",
        metavar="I",
        type=at_least(0),
        help="which of them this is, from 0 (or SPMD_TRAIN_PROCESS_ID)",
    ),
)
HF_DIR = Flag(
    name="hf_dir",
    metavar="DIR",
    type=folder,
    required=True,
    help="a Hugging Face checkpoint: config.json and safetensors files",
)

NEEDED_TARGET = Flag(
    name="target",
    metavar="TARGET",
    required=True,
    help="compile for hardware that is not here: cpu:8, v5e:16x16, 2xv5p:4x4x4 (slices), "
    "h100:4x8 (nodes x GPUs), ...",
)
TARGET = dataclasses.replace(
    NEEDED_TARGET, required=False, help=f"{NEEDED_TARGET.help} (default: the devices at hand)"
)
