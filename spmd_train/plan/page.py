"""A plan as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping

from spmd_train.inspect.collectives import collective_summary
from spmd_train.inspect.schedule import schedule_svg
from spmd_train.plan.answer import Plan
from spmd_train.plan.document import format_plan

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#1a1a1a;background:#fff}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
.bar{display:flex;height:2rem;border:1px solid #888;background:#f2f2f2}
.bar span{display:block;overflow:hidden;color:#fff;font-size:.75rem;padding:.3rem 0 0 .3rem;
white-space:nowrap;box-sizing:border-box}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:9rem 1fr 8rem;gap:.6rem;align-items:center;margin:.2rem 0}
.row div{background:#f2f2f2}.row i{display:block;height:1.1rem}
.wide{overflow-x:auto}
pre{overflow-x:auto;background:#f6f6f6;padding:1rem;font-size:.8rem}
.no{color:#a40000;font-weight:600}.yes{color:#1a6b1a;font-weight:600}
"""
_COLORS = ("#2f5d8a", "#5b8a3c", "#b0722b", "#8a4f7d", "#6b6b6b")


def as_html(plan: Plan) -> str:
    """The page: memory, collectives by axis, roofline, a pipeline's schedule, the plan's text."""
    title = f"Plan for {plan.target.text}"
    verdict = (
        '<span class="yes">fits</span>' if plan.fits else '<span class="no">does not fit</span>'
    )
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{plan.num_params:,} parameters on {plan.num_devices} devices: {verdict}, "
        f"{plan.needed_bytes / 2**30:.2f} of {plan.usable_bytes / 2**30:.2f} GiB.</p>",
        *_memory(plan),
        *_network(plan),
        *_roofline(plan),
        *_schedule(plan),
        "<h2>All of it</h2><pre>" + html.escape("\n".join(format_plan(plan))) + "</pre>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "".join(parts)
        + "</body></html>\n"
    )


def _memory(plan: Plan) -> Iterator[str]:
    temporary = plan.step.memory["temp_bytes"] if plan.step else 0
    gradients = min(plan.state.gradients, temporary)
    sizes = {
        "parameters": plan.state.parameters,
        "optimizer": plan.state.optimizer,
        "gradients": gradients,
        "activations and buffers": temporary - gradients,
    }
    whole = max(plan.usable_bytes, sum(sizes.values()))
    yield "<h2>Memory of a device</h2><div class='bar'>"
    for color, (name, size) in zip(_COLORS, sizes.items(), strict=False):
        yield (
            f"<span style='width:{100 * size / whole:.2f}%;background:{color}' "
            f"title='{name}: {size:,} bytes'>{name}</span>"
        )
    yield "</div><table>"
    for color, (name, size) in zip(_COLORS, sizes.items(), strict=False):
        yield (
            f"<tr><td><span style='color:{color}'>&#9632;</span> {name}</td>"
            f"<td class='n'>{size / 2**30:.3f} GiB</td></tr>"
        )
    yield "</table>"


def _network(plan: Plan) -> Iterator[str]:
    if plan.step is None or not plan.step.collectives:
        return
    by_axes: Mapping[str, int] = collective_summary(plan.step.collectives)["wire_bytes_by_axes"]
    yield "<h2>Sent by a device in a step, by mesh axis</h2>"
    yield from _bars({axes or "one device": size / 1e9 for axes, size in by_axes.items()}, "GB")


def _roofline(plan: Plan) -> Iterator[str]:
    times = plan.roofline
    parts = {"matmuls": times.compute, "memory": times.hbm, "ICI": times.ici, "DCN": times.dcn}
    if times.bubble:
        parts["waits for stages"] = times.bubble
    known = {name: 1000 * seconds for name, seconds in parts.items() if seconds is not None}
    if not known:
        return
    yield "<h2>Roofline: the least time of a step, by what is busy</h2>"
    yield from _bars(known | ({"step": 1000 * times.step} if times.step else {}), "ms")


def _schedule(plan: Plan) -> Iterator[str]:
    if plan.schedule is None:
        return
    yield "<h2>Pipeline: what each stage does, time to the right</h2><div class='wide'>"
    yield schedule_svg(plan.schedule)
    yield (
        "</div><p>F: a microbatch forward; B: backward, with the forward pass made again; W: "
        "weight gradients; grey: the stage waits. A number is the microbatch, a ' the second "
        "chunk.</p>"
    )


def _bars(values: Mapping[str, float], unit: str) -> Iterator[str]:
    largest = max(values.values()) or 1.0
    for i, (name, value) in enumerate(values.items()):
        yield (
            f"<div class='row'><span>{html.escape(name)}</span><div><i style='width:"
            f"{100 * value / largest:.2f}%;background:{_COLORS[i % len(_COLORS)]}'></i></div>"
            f"<span>{value:,.3f} {unit}</span></div>"
        )
