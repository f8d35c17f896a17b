"""Hugging Face checkpoints in and out, leaf by leaf.

A parameter is read straight into its planned sharding: each shard takes its slices of the files, so
that no process holds more than its own shards and, twice, one leaf of them. No torch, no pickles.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from safetensors.numpy import save_file

from spmd_train.config import ConfigError, ModelConfig, MoEConfig
from spmd_train.interop.architectures import ARCHITECTURES, Architecture
from spmd_train.interop.hf_config import NO_EXPERTS, check_model_config, hf_config, read_config
from spmd_train.interop.safetensors_dir import (
    FLOAT_DTYPES,
    INDEX,
    StoredTensor,
    open_tensors,
    split_shards,
)
from spmd_train.interop.tensors import Tensor
from spmd_train.parallel.rules import leaf_path

Tree = dict[str, Any]
"""Nested dicts of arrays: our parameters, or something of their structure."""

_HEAD = "lm_head.weight"
_ROWS_COMPARED = 4096


class _Place(NamedTuple):
    """What a Hugging Face tensor holds: our parameters (several where fused), and where in them."""

    tensors: list[Tensor]
    at: tuple[int, ...]


def open_params(
    hf_dir: Path, *, config: ModelConfig, abstract_params: Tree, moe: MoEConfig = NO_EXPERTS
) -> Callable[[], Tree]:
    """Looks whether a checkpoint can be read into the sharding planned for it.

    Args:
        hf_dir: `config.json` and `model.safetensors`, or several files and their index.
        config: the model, which must be the checkpoint's.
        moe: its experts.
        abstract_params: tree of ShapeDtypeStructs with shardings; tensors of any float dtype are
            converted to theirs.

    Returns:
        What reads it: gives the tree of global arrays. Each process reads the slices of its own
        devices.

    Raises:
        ConfigError: the config is not the checkpoint's or is not supported; files are missing or
            damaged; tensors are missing, left over or of another shape.
    """
    architecture = check_model_config(config, read_config(hf_dir), moe=moe)
    leaves = _leaves(abstract_params)
    places = _places(architecture, leaves)
    stored = _check_tensors(open_tensors(hf_dir), architecture, places, leaves)
    tables = {tensor.path: tensor for tensor in architecture.tensors}
    return lambda: jax.tree_util.tree_map_with_path(
        lambda path, leaf: _load_leaf(tables[leaf_path(path)], leaf, stored), abstract_params
    )


def _load_leaf(
    tensor: Tensor, leaf: jax.ShapeDtypeStruct, stored: Mapping[str, StoredTensor]
) -> jax.Array:
    shape, stacked = leaf.shape, tensor.num_stacked
    shards: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        ranges = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        if ranges not in shards:  # Devices that hold the same shard share it.
            shards[ranges] = np.empty([stop - start for start, stop in ranges], leaf.dtype)
            outer, inner = ranges[:stacked], ranges[stacked:]
            for at in itertools.product(*(range(*r) for r in outer)):
                part = tensor.read(shape, inner, stored[tensor.name_of(at)].read)
                here = tuple(i - start for i, (start, _) in zip(at, outer, strict=True))
                shards[ranges][here] = part
        return shards[ranges]

    return jax.make_array_from_callback(shape, leaf.sharding, read, dtype=leaf.dtype)


def _check_tensors(
    files: Mapping[str, StoredTensor],
    architecture: Architecture,
    places: Mapping[str, _Place],
    leaves: Mapping[str, Any],
) -> dict[str, StoredTensor]:
    """The tensors of our parameters, under their full names."""
    prefix, files = architecture.prefix, dict(files)
    stored, told = {}, []
    for name, (tensors, _) in places.items():
        found = files.pop(name, None) or files.pop(name.removeprefix(prefix), None)
        shape = tensors[0].hf_shape(leaves[tensors[0].path].shape)
        if found is None:
            told.append(f"{name} {list(shape)}: missing")
        elif found.shape != shape:
            told.append(f"{name}: {list(found.shape)} in the checkpoint, must be {list(shape)}")
        elif found.dtype not in FLOAT_DTYPES:
            told.append(f"{name}: dtype {found.dtype}, must be {', '.join(FLOAT_DTYPES)}")
        else:
            stored[name] = found
    table = stored.get(architecture.tensors[0].name)
    for name, tensor in files.items():
        if name == _HEAD and "head/kernel" not in leaves and table is not None:
            if not _equal(tensor, table):
                told.append(f"{name}: is not the embedding table, but the config ties them")
        elif not re.fullmatch(architecture.unused, prefix + name.removeprefix(prefix)):
            told.append(f"{name} {list(tensor.shape)}: the config has no such parameter")
    if told:
        raise ConfigError(
            "the checkpoint's tensors are not the config's; nothing was loaded:\n  "
            + "\n  ".join(told)
        )
    return stored


def _equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors hold the same, a few rows at a time."""
    if a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], _ROWS_COMPARED)
    blocks = [slice(i, min(i + _ROWS_COMPARED, a.shape[0])) for i in starts]
    return all(np.array_equal(a.read([rows]), b.read([rows])) for rows in blocks)


def save_params(
    params: Tree,
    *,
    config: ModelConfig,
    hf_dir: Path,
    dtype: str,
    moe: MoEConfig = NO_EXPERTS,
    max_shard_bytes: int = 5 * 10**9,
) -> list[str]:
    """Writes parameters as a checkpoint that `transformers` reads; all of it, or nothing.

    Args:
        params: tree of global arrays. Every process must call this; the first one writes.
        config: the model.
        moe: its experts.
        hf_dir: where to; it is made, and if it is there it must be empty.
        dtype: of the tensors written.
        max_shard_bytes: size of a file, unless one tensor is larger, and so what the host holds.

    Returns:
        Names of the files.

    Raises:
        ConfigError: no architecture does what the model does, or `hf_dir` is not empty.
    """
    config_json = {**hf_config(config, moe=moe), "torch_dtype": dtype}
    if hf_dir.exists() and (not hf_dir.is_dir() or any(hf_dir.iterdir())):
        raise ConfigError(f"--hf_dir: {hf_dir} is there already, and not empty; name another")
    shapes = hf_shapes(params, config=config, moe=moe)
    sizes = {name: math.prod(s) * np.dtype(dtype).itemsize for name, s in shapes.items()}
    shards = split_shards(sizes, max_shard_bytes)
    documents = {"config.json": config_json}
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        metadata = {"total_size": sum(sizes.values())}
        documents[INDEX] = {"metadata": metadata, "weight_map": weight_map}

    is_writer = jax.process_index() == 0
    partial = hf_dir.absolute().with_name(f".{hf_dir.name}.{os.getpid()}.partial")
    tensors = to_hf(params, config=config, moe=moe)
    try:
        if is_writer:
            partial.mkdir(parents=True)
            for name, document in documents.items():
                (partial / name).write_text(json.dumps(document, indent=2) + "\n")
        for file, names in shards.items():
            shard = {}
            for name, array in itertools.islice(tensors, len(names)):
                if is_writer:
                    shard[name] = np.ascontiguousarray(array, dtype)
            if is_writer:
                # transformers refuses files that do not say that they are laid out as torch does.
                save_file(shard, partial / file, metadata={"format": "pt"})
                # safetensors lets nobody else read them.
                shutil.copymode(partial / "config.json", partial / file)
        if is_writer:
            partial.rename(hf_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return [*documents, *shards]


def to_hf(
    params: Tree, *, config: ModelConfig, moe: MoEConfig = NO_EXPERTS
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters, or their gradients, as Hugging Face's tensors, one after another.

    Args:
        params: tree of global arrays; every process must take all of it.
        config: the model.
        moe: its experts.

    Yields:
        Name and array, in the leaf's own dtype.

    Raises:
        ConfigError: no architecture does what the model does.
    """
    leaves = _leaves(params)
    for name, (tensors, at) in _places(_architecture(config, moe), leaves).items():
        yield name, tensors[0].write([_fetch(leaves[t.path], at) for t in tensors])


def hf_shapes(
    params: Tree, *, config: ModelConfig, moe: MoEConfig = NO_EXPERTS
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `to_hf` gives; `params` may be abstract."""
    leaves = _leaves(params)
    return {
        name: tensors[0].hf_shape(leaves[tensors[0].path].shape)
        for name, (tensors, _) in _places(_architecture(config, moe), leaves).items()
    }


def _architecture(config: ModelConfig, moe: MoEConfig) -> Architecture:
    return ARCHITECTURES[hf_config(config, moe=moe)["architectures"][0]]


def _places(architecture: Architecture, leaves: Mapping[str, Any]) -> dict[str, _Place]:
    """What each tensor of a checkpoint holds."""
    places: dict[str, _Place] = {}
    for tensor in architecture.tensors:
        if tensor.path in leaves:
            stacked = leaves[tensor.path].shape[: tensor.num_stacked]
            for at in itertools.product(*map(range, stacked)):
                place = places.setdefault(tensor.name_of(at), _Place([], at))
                place.tensors.append(tensor)
    placed = {tensor.path for place in places.values() for tensor in place.tensors}
    assert placed == set(leaves), f"{architecture.name}: no place for {set(leaves) - placed}"
    return places


def _leaves(tree: Tree) -> dict[str, Any]:
    return {leaf_path(p): leaf for p, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _fetch(leaf: jax.Array, at: tuple[int, ...]) -> np.ndarray:
    if at:
        inner = leaf.shape[len(at) :]
        start, sizes = (*at, *[0] * len(inner)), (*[1] * len(at), *inner)
        x = jax.lax.dynamic_slice(leaf, start, sizes).reshape(inner)
    else:
        x = jnp.copy(leaf)  # An array keeps the host copy once made of it; this one goes away.
    if not x.is_fully_addressable:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
