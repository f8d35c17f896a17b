"""The sharding plan: for every leaf of the train state a PartitionSpec, and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd_train.config import ConfigError
from spmd_train.config.keys import nearest_divisor
from spmd_train.parallel.rules import (
    LogicalAxes,
    dims_of,
    leaf_path,
    mesh_axes_of,
    mirrored,
    to_spec,
)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """Where one array lives.

    Attributes:
        path: its place in the tree, as in `params/blocks/mlp/up/kernel`.
        shape: global shape.
        dtype: NumPy's name for the dtype.
        spec: mesh axes of each dim.
        reason: what decided: an override, a rule, the FSDP fallback, its parameter.
        bytes: of the whole array.
        bytes_per_device: of one shard.
        memory: where a shard waits between steps: `device`, or `host`, next to its device.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: P
    reason: str
    bytes: int
    bytes_per_device: int
    memory: str = "device"


def _leaf_plan(path: str, leaf: Any, dims: Sequence[tuple[str, ...]], reason: str, mesh: Mesh):
    shards = math.prod(mesh.shape[a] for dim in dims for a in dim)
    dtype = leaf.dtype
    # Random keys and the like have extended dtypes without a NumPy item size.
    size = math.prod(leaf.shape) * (dtype.itemsize if isinstance(dtype, np.dtype) else 8)
    return LeafPlan(
        path, tuple(leaf.shape), str(dtype), to_spec(dims), reason, size, size // shards
    )


def _check(
    path: str,
    shape: Sequence[int],
    dims: Sequence[tuple[str, ...]],
    names: LogicalAxes,
    mesh: Mesh,
    why: str,
) -> None:
    seen: dict[str, int] = {}
    for i, (size, axes, name) in enumerate(zip(shape, dims, names, strict=True)):
        for axis in axes:
            if axis in seen:
                raise ConfigError(
                    f"{path} {tuple(shape)}: dims {seen[axis]} and {i} are both on mesh axis "
                    f"{axis!r} ({why}); change sharding.rules or sharding.overrides"
                )
            seen[axis] = i
        shards = math.prod(mesh.shape[a] for a in axes)
        if size % shards:
            best = nearest_divisor(size, shards)
            cure = f"set sharding.rules.{name} to none" if name else "change the override"
            raise ConfigError(
                f"{path} {tuple(shape)}: dim {i} of size {size} does not divide over "
                f"{'+'.join(axes)} = {shards} devices ({why}); the nearest number that divides it "
                f"is {best}; or {cure}"
            )


def _parse_override(pattern: str, text: str, ndim: int, path: str) -> list[tuple[str, ...]]:
    where = f"sharding.overrides[{pattern!r}]"
    dims = [mesh_axes_of(part, where=where) for part in str(text).split(",")]
    if len(dims) > ndim:
        raise ConfigError(f"{where}: {text!r} names {len(dims)} dims, but {path} has {ndim}")
    return dims + [()] * (ndim - len(dims))


def _fsdp_dims(
    shape: Sequence[int], rules: Mapping[str, tuple[str, ...]], mesh: Mesh
) -> list[tuple[str, ...]] | None:
    axes = tuple(a for a in rules["embed"] if mesh.shape[a] > 1)
    shards = math.prod(mesh.shape[a] for a in axes)
    fits = [i for i, size in enumerate(shape) if size % shards == 0 and size >= shards]
    if shards == 1 or not fits:
        return None
    largest = max(fits, key=lambda i: shape[i])
    return [axes if i == largest else () for i in range(len(shape))]


def plan_params(
    params: Any,
    logical_axes: Mapping[str, LogicalAxes | None],
    *,
    rules: Mapping[str, tuple[str, ...]],
    overrides: Mapping[str, str],
    mesh: Mesh,
) -> dict[str, LeafPlan]:
    """Plans the parameters.

    Per leaf: a path override, else its logical axes through the rules, else FSDP on the largest
    dim that divides, else replicated.

    Args:
        params: tree of arrays or ShapeDtypeStructs.
        logical_axes: path to logical axes, None where the leaf has none.
        rules: logical axis to mesh axes.
        overrides: regular expression on the whole path to 'axis,axis,...'.
        mesh: the mesh.

    Returns:
        Path to plan, in the order of the tree's leaves.

    Raises:
        ConfigError: a dim does not divide, two dims share a mesh axis, an override matches nothing.
    """
    unmatched = set(overrides)
    plans: dict[str, LeafPlan] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path = leaf_path(key_path)
        pattern = next((p for p in overrides if re.fullmatch(p, path)), None)
        axes = logical_axes.get(path)
        names: LogicalAxes = (None,) * len(leaf.shape)
        if pattern is not None:
            unmatched -= {p for p in overrides if re.fullmatch(p, path)}
            dims = _parse_override(pattern, overrides[pattern], len(leaf.shape), path)
            reason = f"override {pattern!r}"
        elif axes is not None:
            names = axes
            dims = [() if name is None else rules[name] for name in axes]
            told = [f"{n}->{'+'.join(rules[n])}" for n in axes if n is not None and rules[n]]
            reason = "rules " + ", ".join(told) if told else "rules: replicated"
        else:
            found = _fsdp_dims(leaf.shape, rules, mesh)
            dims = found or [()] * len(leaf.shape)
            reason = "fsdp on the largest dim" if found else "replicated: nothing divides"
        dims = [tuple(a for a in dim if mesh.shape[a] > 1) for dim in dims]
        _check(path, leaf.shape, dims, names, mesh, reason)
        plans[path] = _leaf_plan(path, leaf, dims, reason, mesh)
    if unmatched:
        raise ConfigError(
            f"sharding.overrides: {sorted(unmatched)} match no parameter; the paths are "
            f"{', '.join(list(plans)[:6])}, ... (`spmd-train inspect shardings` prints them all)"
        )
    return plans


def plan_state(
    state: Any,
    param_plans: Mapping[str, LeafPlan],
    *,
    rules: Mapping[str, tuple[str, ...]],
    mesh: Mesh,
    offload: str = "none",
) -> dict[str, LeafPlan]:
    """Plans the rest of the train state: whatever mirrors a parameter follows it.

    A leaf mirrors the parameter whose path is the tail of its own. With the parameter's shape it
    gets its spec; with some of its dims (Adafactor's factored moments) the specs of those dims;
    otherwise FSDP on the largest dim that divides, else replicated.

    Args:
        state: tree of arrays or ShapeDtypeStructs, parameters included.
        param_plans: from `plan_params`.
        rules: logical axis to mesh axes.
        mesh: the mesh.
        offload: `optimizer.offload`; `host`: what mirrors a parameter in the optimizer's state
            waits in the host's memory.

    Returns:
        Path to plan, in the order of the tree's leaves.
    """
    plans: dict[str, LeafPlan] = {}
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        path = leaf_path(key_path)
        parts = path.split("/")
        owner = mirrored(path, param_plans)
        param = None if owner is None else param_plans[owner]
        shape = tuple(leaf.shape)
        if param is not None and shape == param.shape:
            dims = dims_of(param.spec, ndim=len(shape))
            reason = param.reason if parts[0] == "params" else f"follows params/{param.path}"
        elif param is not None and (kept := _kept_dims(shape, param.shape)) is not None:
            planned = dims_of(param.spec, ndim=len(param.shape))
            dims = [planned[i] for i in kept]
            reason = f"follows dims {kept} of params/{param.path}"
        else:
            found = _fsdp_dims(shape, rules, mesh) if shape else None
            dims = found or [()] * len(shape)
            reason = "fsdp on the largest dim" if found else "replicated: small"
        plan = _leaf_plan(path, leaf, dims, reason, mesh)
        waits = offload == "host" and parts[0] == "opt_state" and param is not None
        plans[path] = dataclasses.replace(plan, memory="host") if waits else plan
    return plans


def _kept_dims(shape: Sequence[int], of: Sequence[int]) -> list[int] | None:
    """Indices of the dims of `of` that make `shape` when exactly one dim is dropped."""
    for dropped in range(len(of)):
        kept = [i for i in range(len(of)) if i != dropped]
        if len(of) > 1 and [of[i] for i in kept] == list(shape):
            return kept
    return None


def shardings_of(tree: Any, plans: Mapping[str, LeafPlan], *, mesh: Mesh) -> Any:
    """The tree of NamedShardings that a plan means."""

    def one(path: Any, _: Any) -> NamedSharding:
        plan = plans[leaf_path(path)]
        sharding = NamedSharding(mesh, plan.spec)
        return sharding.with_memory_kind("pinned_host") if plan.memory == "host" else sharding

    return jax.tree_util.tree_map_with_path(one, tree)
