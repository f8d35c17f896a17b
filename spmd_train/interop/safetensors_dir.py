"""The safetensors files of a checkpoint directory, read a slice at a time, and written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

# Registers bfloat16 with NumPy, which safetensors needs to know it by name.
import ml_dtypes  # noqa: F401
import numpy as np
from safetensors import SafetensorError, safe_open

from spmd_train.config import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        path: the file.
        shape: its shape.
        dtype: safetensors' name of its dtype, as in `BF16`.
    """

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: str

    def read(self, index: Sequence[slice]) -> np.ndarray:
        """Reads a slice into memory; nothing of the file stays mapped."""
        with safe_open(self.path, framework="np") as file:
            return file.get_slice(self.name)[tuple(index)]


def open_tensors(hf_dir: Path) -> dict[str, StoredTensor]:
    """Name to tensor, for all files of a checkpoint; reads their headers only.

    Raises:
        ConfigError: there is none, the index names a file that is not in the directory, or a file
            is damaged.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(hf_dir):
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                for name in names:
                    if name in tensors:
                        raise ConfigError(f"{name} is in {path} and in {tensors[name].path}")
                    tensor = file.get_slice(name)
                    shape = tuple(tensor.get_shape())
                    tensors[name] = StoredTensor(name, path, shape, tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"{path}: no whole safetensors file: {str(error)[:200]}; copy or download it again"
            ) from error
    return tensors


def _files(hf_dir: Path) -> list[Path]:
    if (hf_dir / SINGLE).is_file():
        return [hf_dir / SINGLE]
    index = hf_dir / INDEX
    if not index.is_file():
        pickles = sorted(p.name for p in hf_dir.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        cure = (
            f". {pickles[0]} is a Python pickle, which can run code when it is loaded, and is "
            "never read here: where you trust it, convert it with transformers' "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            if pickles
            else ""
        )
        raise ConfigError(f"--hf_dir: {hf_dir} has neither {SINGLE} nor {INDEX}{cure}")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = [n for n in names if Path(n).name != n or not (hf_dir / n).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise ConfigError(f"{index}: no index of safetensors files: {repr(error)[:200]}") from error
    if outside:
        raise ConfigError(
            f"{index}: names {str(sorted(outside))[:200]}, which are no files of {hf_dir}"
        )
    return [hf_dir / name for name in sorted(names)]


def split_shards(sizes: Mapping[str, int], max_bytes: int) -> dict[str, list[str]]:
    """Deals tensors out to files.

    Args:
        sizes: name to bytes, in the order in which they are kept.
        max_bytes: of a file, unless one tensor is larger.

    Returns:
        File name to names of tensors.
    """
    shards: list[list[str]] = []
    filled = max_bytes
    for name, size in sizes.items():
        if filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": names
        for i, names in enumerate(shards)
    }
