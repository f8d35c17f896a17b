"""The sharding plan as rows and totals: what `spmd-train inspect shardings` shows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spmd_train.parallel.plan import LeafPlan
from spmd_train.parallel.rules import dims_of

_PARAMS = "params/"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Total:
    """What some arrays take.

    Attributes:
        num_arrays: how many.
        bytes: of the whole arrays.
        bytes_per_device: of their shards on one device.
    """

    num_arrays: int
    bytes: int
    bytes_per_device: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """State that lies alike: one array, or a copy of the parameters such as Adam's first moment.

    Attributes:
        path: of the array; of a copy with `*` for the parameter's path.
        dtypes: of the arrays.
        reason: what decided.
        total: what they take.
    """

    path: str
    dtypes: tuple[str, ...]
    reason: str
    total: Total


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingTable:
    """A plan, sorted out.

    Attributes:
        params: the parameters, by their paths as in `sharding.overrides`, in the tree's order.
        rest: every other leaf of the train state: optimizer state, moving average, step.
        groups: `rest`, in fewer rows.
        num_params: numbers in the parameters.
        totals: `parameters`, `optimizer` (all of `rest`) and `state` (both).
    """

    params: tuple[LeafPlan, ...]
    rest: tuple[LeafPlan, ...]
    groups: tuple[Group, ...]
    num_params: int
    totals: Mapping[str, Total]


def sharding_table(plans: Mapping[str, LeafPlan]) -> ShardingTable:
    """Sorts a program's plan into parameters and the rest.

    Args:
        plans: `Program.plans`: path to plan, for every leaf of the train state.

    Returns:
        The table.
    """
    params = tuple(
        dataclasses.replace(plan, path=path.removeprefix(_PARAMS))
        for path, plan in plans.items()
        if path.startswith(_PARAMS)
    )
    rest = tuple(plan for path, plan in plans.items() if not path.startswith(_PARAMS))
    totals = {"parameters": _total(params), "optimizer": _total(rest)}
    return ShardingTable(
        params=params,
        rest=rest,
        groups=_groups(rest, params),
        num_params=sum(math.prod(plan.shape) for plan in params),
        totals=totals | {"state": _total((*params, *rest))},
    )


def _total(plans: Iterable[LeafPlan]) -> Total:
    plans = list(plans)
    return Total(
        num_arrays=len(plans),
        bytes=sum(plan.bytes for plan in plans),
        bytes_per_device=sum(plan.bytes_per_device for plan in plans),
    )


def _groups(rest: Sequence[LeafPlan], params: Sequence[LeafPlan]) -> tuple[Group, ...]:
    paths = {param.path for param in params}
    members: dict[tuple[str, str], list[LeafPlan]] = {}
    for plan in rest:
        parts = plan.path.split("/")
        tails = ("/".join(parts[i:]) for i in range(1, len(parts)))
        param = next((tail for tail in tails if tail in paths), None)
        path, reason = plan.path, plan.reason
        if param is not None:
            path = path.removesuffix(param) + "*"
            reason = reason.replace(f"params/{param}", "the parameter")
        members.setdefault((path, reason), []).append(plan)
    return tuple(
        Group(
            path=path,
            dtypes=tuple(sorted({plan.dtype for plan in plans})),
            reason=reason,
            total=_total(plans),
        )
        for (path, reason), plans in members.items()
    )


def as_json(table: ShardingTable, *, mesh: Mapping[str, int]) -> dict[str, Any]:
    """The table as JSON: every leaf by itself, a spec as the mesh axes of each dim.

    Args:
        table: from `sharding_table`.
        mesh: mesh axis to size.

    Returns:
        `mesh`, `num_devices`, `num_parameters`, `parameters`, `optimizer` (a row per leaf) and
        `totals` of `parameters`, `optimizer` and `state`.
    """

    def row(plan: LeafPlan) -> dict[str, Any]:
        spec = [list(axes) for axes in dims_of(plan.spec, ndim=len(plan.shape))]
        return dataclasses.asdict(plan) | {"shape": list(plan.shape), "spec": spec}

    return {
        "mesh": dict(mesh),
        "num_devices": math.prod(mesh.values()),
        "num_parameters": table.num_params,
        "parameters": [row(plan) for plan in table.params],
        "optimizer": [row(plan) for plan in table.rest],
        "totals": {name: dataclasses.asdict(total) for name, total in table.totals.items()},
    }
