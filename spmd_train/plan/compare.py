"""Two compiled steps side by side: memory, FLOPs, size, collectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from spmd_train.config import ExperimentConfig, describe
from spmd_train.inspect.collectives import collective_summary
from spmd_train.observe.columns import columns
from spmd_train.parallel.mesh import mesh_text
from spmd_train.plan.compiled import CompiledStep
from spmd_train.plan.hlo_cost import program_cost

_LABELS = ("op", "axes", "network", "scope", "source", "dtype")
_AMOUNTS = ("count", "bytes", "wire_bytes")
_NONE = {"count": 0, "bytes": 0, "wire_bytes": 0}
_MEASURES: Mapping[str, str] = {
    "argument_bytes": "memory: arguments",
    "temp_bytes": "memory: temporaries",
    "peak_bytes": "memory: peak",
    "matmul_flops": "matmul FLOPs",
    "hbm_traffic_bytes": "bytes read and written",
    "wire_bytes": "wire bytes",
    "num_collectives": "collectives executed",
    "num_instructions": "HLO instructions",
    "hlo_bytes": "HLO text, bytes",
    "compile_seconds": "compile seconds, or of the cache",
}
"""What is compared, per device and step, and how people read it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One of two programs.

    Attributes:
        name: what the user calls it.
        config: what it was made from.
        mesh: mesh axis to size.
        step: what the compiler made.
    """

    name: str
    config: ExperimentConfig
    mesh: Mapping[str, int]
    step: CompiledStep


def measures(step: CompiledStep) -> dict[str, float | None]:
    """The figures of `compare`'s `totals`, of one program."""
    summary, cost = collective_summary(step.collectives), program_cost(step.hlo_text)
    counts = [c.count for c in step.collectives]
    told = {
        **{name: step.memory[name] for name in ("argument_bytes", "temp_bytes", "peak_bytes")},
        "matmul_flops": cost.flops,
        "hbm_traffic_bytes": cost.hbm_bytes,
        "wire_bytes": summary["wire_bytes"],
        "num_collectives": None if None in counts else sum(filter(None, counts)),
        "num_instructions": cost.num_instructions,
        "hlo_bytes": len(step.hlo_text.encode()),
        "compile_seconds": step.compile_seconds,
    }
    return {name: told[name] for name in _MEASURES}


def compare(first: Side, second: Side) -> dict[str, Any]:
    """What differs between two programs, as JSON; bytes and FLOPs are per device and step.

    Returns:
        `programs`: name and mesh of both. `config`: the keys whose values differ, with both.
        `totals`: name to `[first, second]`; null where a loop's trip count is unknown.
        `collectives`: a row per (op, axes, network, scope, source, dtype), what differs most
        first, with `first` and `second`: their `count`, `bytes` and `wire_bytes`, zeros where a
        program has none, null where a count is unknown; and `same`.
    """
    rows = _rows(first), _rows(second)
    keys = list(dict.fromkeys([*rows[0], *rows[1]]))
    collectives = []
    for key in keys:
        one, other = (side.get(key, _NONE) for side in rows)
        collectives.append(
            dict(zip(_LABELS, key, strict=True))
            | {"axes": list(key[1]), "first": one, "second": other, "same": one == other}
        )
    collectives.sort(key=lambda row: -_moved(row))
    totals = measures(first.step), measures(second.step)
    return {
        "programs": [{"name": side.name, "mesh": dict(side.mesh)} for side in (first, second)],
        "config": _config_difference(first.config, second.config),
        "totals": {name: [side[name] for side in totals] for name in _MEASURES},
        "collectives": collectives,
    }


def _rows(side: Side) -> dict[tuple[Any, ...], dict[str, int | None]]:
    """Amounts by label; asynchronous, conditional and plain ones together."""
    rows: dict[tuple[Any, ...], dict[str, int | None]] = {}
    for row in collective_summary(side.step.collectives)["collectives"]:
        key = tuple(tuple(row[x]) if x == "axes" else row[x] for x in _LABELS)
        old = rows.setdefault(key, dict(_NONE))
        for name in _AMOUNTS:
            one, more = old[name], row[name]
            old[name] = None if one is None or more is None else one + more
    return rows


def _moved(row: Mapping[str, Any]) -> float:
    """By how many wire bytes a row differs; an unknown number counts as most."""
    one, other = row["first"]["wire_bytes"], row["second"]["wire_bytes"]
    return float("inf") if one is None or other is None else abs(other - one)


def _config_difference(first: ExperimentConfig, second: ExperimentConfig) -> list[dict[str, Any]]:
    sides = [{d.path: d.value for d in describe(config)} for config in (first, second)]
    return [
        {"key": path, "first": sides[0].get(path), "second": sides[1].get(path)}
        for path in dict.fromkeys([*sides[0], *sides[1]])
        if sides[0].get(path) != sides[1].get(path)
    ]


def format_comparison(told: Mapping[str, Any]) -> Iterator[str]:
    """The lines that people read, of `compare`'s answer."""
    for mark, program in zip("AB", told["programs"], strict=True):
        yield f"{mark}: {program['name']}: {mesh_text(program['mesh'])}"
    yield ""
    if told["config"]:
        lines = [
            (row["key"], _value(row["first"]), _value(row["second"])) for row in told["config"]
        ]
        yield from columns([("config", "A", "B"), *lines])
    else:
        yield "the configs are the same"
    yield ""
    totals = [
        (_MEASURES[name], _number(one), _number(other), _change(one, other))
        for name, (one, other) in told["totals"].items()
    ]
    yield from columns([("per device and step", "A", "B", "B to A"), *totals], right=(1, 2, 3))
    yield ""
    changed = [row for row in told["collectives"] if not row["same"]]
    same = [row for row in told["collectives"] if row["same"]]
    if changed:
        heads = ("collectives", "axes", "network", "count A", "B", "wire bytes A", "B", "where")
        yield from columns([heads, *map(_collective, changed)], right=(3, 4, 5, 6))
    wire = sum(row["first"]["wire_bytes"] or 0 for row in same)
    yield f"collectives that are the same in both: {len(same)}, {wire:,} wire bytes"


def _collective(row: Mapping[str, Any]) -> tuple[str, ...]:
    pairs = [
        _number(row[side][name]) for name in ("count", "wire_bytes") for side in ("first", "second")
    ]
    place = "/".join(filter(None, (row["scope"], row["source"])))
    return row["op"], "+".join(row["axes"]) or "-", row["network"], *pairs, place


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float) and value < 1000:
        return f"{value:.2f}"
    return f"{value:,.0f}"


def _value(value: Any) -> str:
    return "(not set)" if value is None else str(value)


def _change(one: float | None, other: float | None) -> str:
    if one is None or other is None:
        return ""
    if one == other:
        return "="
    return f"x {other / one:.3g}" if one else "new"
