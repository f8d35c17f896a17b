"""A plan as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping

from spmd_train.inspect.collectives import collective_summary
from spmd_train.inspect.schedule import schedule_svg
from spmd_train.observe.html import COLORS, page, stacked_bar
from spmd_train.plan.answer import Plan
from spmd_train.plan.document import format_plan, gib


def as_html(plan: Plan) -> str:
    """The page: memory, collectives by axis, roofline, a pipeline's schedule, the plan's text."""
    title = f"Plan for {plan.target.text}"
    verdict = (
        '<span class="yes">fits</span>' if plan.fits else '<span class="no">does not fit</span>'
    )
    parts = [
        f"<p>{plan.num_params:,} parameters on {plan.num_devices} devices: {verdict}, "
        f"{gib(plan.needed_bytes)} of {gib(plan.usable_bytes)}.</p>",
        *_memory(plan),
        *_network(plan),
        *_roofline(plan),
        *_schedule(plan),
        "<h2>All of it</h2><pre>" + html.escape("\n".join(format_plan(plan))) + "</pre>",
    ]
    return page(title, parts)


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
    yield "<h2>Memory of a device</h2>"
    yield from stacked_bar(sizes, whole=whole, unit="bytes")
    yield "<table>"
    for color, (name, size) in zip(COLORS, sizes.items(), strict=False):
        yield (
            f"<tr><td><span style='color:{color}'>&#9632;</span> {name}</td>"
            f"<td class='n'>{gib(size)}</td></tr>"
        )
    yield "</table>"


def _network(plan: Plan) -> Iterator[str]:
    if plan.step is None or not plan.step.collectives:
        return
    by_axes: Mapping[str, int] = collective_summary(plan.step.collectives)["wire_bytes_by_axes"]
    yield "<h2>Sent by a device in a step, by mesh axis</h2>"
    large = max(by_axes.values()) >= 1e8
    scale, unit = (1e9, "GB") if large else (1e6, "MB")
    sizes = sorted(by_axes.items(), key=lambda item: -item[1])
    yield from _bars({axes or "one device": size / scale for axes, size in sizes}, unit)


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
            f"{100 * value / largest:.2f}%;background:{COLORS[i % len(COLORS)]}'></i></div>"
            f"<span>{value:,.3f} {unit}</span></div>"
        )
