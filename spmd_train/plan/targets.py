"""What a target such as `2xv5p:4x4x4` names: a chip, how many, and how they are wired."""

from __future__ import annotations

import dataclasses
import math
import re

from spmd_train.config import ConfigError
from spmd_train.parallel.chips import CHIPS, Chip

_TEXT = re.compile(r"(?:(\d+)x)?([a-z][\w\-]*):(\d+(?:x\d+)*)")

TPUS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "v7x": "tpu7x"}
"""Chip to the name that libtpu has for it."""

GPUS = {"a100": "a100-80gb", "a100-40gb": "a100-40gb", "h100": "h100", "h200": "h200", "b200": ""}
"""Target's word to its chip; empty: the same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Hardware to compile for.

    Attributes:
        text: as the user wrote it.
        platform: `cpu`, `tpu` or `gpu`.
        chip_name: key of `CHIPS`; empty for CPUs.
        num_slices: TPU slices; 1 elsewhere.
        shape: chips of a slice along each torus dim; nodes and GPUs per node; CPU devices.
    """

    text: str
    platform: str
    chip_name: str
    num_slices: int
    shape: tuple[int, ...]

    @property
    def chip(self) -> Chip | None:
        """What the maker says the chip can do; None for CPUs."""
        return CHIPS.get(self.chip_name)

    @property
    def num_chips(self) -> int:
        """Chips in all slices."""
        return self.num_slices * math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """For each torus dim whether its ends are joined.

        https://docs.cloud.google.com/tpu/docs/system-architecture-tpu-vm: v4, v5p and TPU7x are
        tori where every dim is a multiple of 4, the 2-D chips along dims of 16.
        """
        if self.platform != "tpu":
            return ()
        if self.chip_name in ("v5e", "v6e"):
            return tuple(size == 16 for size in self.shape)
        whole = all(size % 4 == 0 for size in self.shape)
        return (whole,) * len(self.shape)


def parse_target(text: str) -> Target:
    """Reads a target.

    Args:
        text: `cpu:N`, `TPU:AxB[xC]`, `SLICESxTPU:AxBxC` or `GPU:NODESxGPUS`.

    Returns:
        The target; nothing is loaded.

    Raises:
        ConfigError: there is no such target.
    """
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"--target={text}: cannot be read; {_known()}")
    slices, word, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    told = {"text": text.strip(), "num_slices": slices, "shape": shape}
    if 0 in (slices, *shape):
        raise ConfigError(f"--target={text}: every size must be at least 1")
    if word in TPUS:
        dims = 2 if word in ("v5e", "v6e") else 3
        if len(shape) != dims:
            raise ConfigError(
                f"--target={text}: a {word} slice has {dims} dims, as in "
                f"{word}:{'x'.join(['4'] * dims)}"
            )
        return Target(platform="tpu", chip_name=word, **told)
    if slices > 1:
        raise ConfigError(f"--target={text}: only TPUs come in slices; {_known()}")
    if word in GPUS:
        if len(shape) != 2:
            raise ConfigError(f"--target={text}: write nodes x GPUs, as in {word}:4x8")
        return Target(platform="gpu", chip_name=GPUS[word] or word, **told)
    if word == "cpu":
        if len(shape) != 1:
            raise ConfigError(f"--target={text}: write the number of devices, as in cpu:8")
        return Target(platform="cpu", chip_name="", **told)
    raise ConfigError(f"--target={text}: no such chip: {word}; {_known()}")


def _known() -> str:
    return (
        f"known are cpu:N; TPUs {', '.join(TPUS)}, as in v5e:16x16 or v5p:4x4x8, and 2xv5p:4x4x4 "
        f"for two slices; GPUs {', '.join(GPUS)}, as in h100:4x8 (nodes x GPUs)"
    )
