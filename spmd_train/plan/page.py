"""A plan as one HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterator

from spmd_train.inspect.collectives import collective_summary
from spmd_train.inspect.schedule import schedule_svg
from spmd_train.observe.html import COLORS, bars, page, stacked_bar
from spmd_train.parallel.mesh import mesh_text
from spmd_train.plan.answer import Plan
from spmd_train.plan.document import format_plan, gib
from spmd_train.plan.overlap import overlap_lines


def as_html(plan: Plan) -> str:
    """The page: memory, collectives by axis, roofline, a pipeline's schedule, the plan's text."""
    verdict = (
        '<span class="yes">fits</span>' if plan.fits else '<span class="no">does not fit</span>'
    )
    parts = [
        f"<p>{plan.num_params:,} parameters on {plan.num_devices} devices, "
        f"{html.escape(mesh_text(plan.mesh))}: {verdict}, {gib(plan.needed_bytes)} of "
        f"{gib(plan.usable_bytes)}. {_told_speed(plan)}</p>",
        *_memory(plan),
        *_network(plan),
        *_roofline(plan),
        *_schedule(plan),
        "<h2>All of it</h2><pre>" + html.escape("\n".join(format_plan(plan))) + "</pre>",
    ]
    return page(f"Plan for {plan.target.text}", parts)


def _told_speed(plan: Plan) -> str:
    if plan.roofline.step is None or plan.tokens_per_second is None or plan.mfu is None:
        return ""
    return (
        f"At best {_time(plan.roofline.step)} a step, {plan.tokens_per_second:,.0f} tokens/s, "
        f"MFU {plan.mfu:.1%}."
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
    yield "<h2>Memory of a device</h2>"
    yield from stacked_bar(sizes, whole=whole, unit="bytes")
    yield "<table>"
    for color, (name, size) in zip(COLORS, sizes.items(), strict=False):
        yield (
            f"<tr><td><span style='color:{color}'>&#9632;</span> {name}</td>"
            f"<td class='n'>{gib(size)}</td></tr>"
        )
    free = max(plan.usable_bytes - plan.needed_bytes, 0)
    yield f"<tr><td>&#9633; free</td><td class='n'>{gib(free)}</td></tr></table>"


def _network(plan: Plan) -> Iterator[str]:
    if plan.step is None or not plan.step.collectives:
        return
    summary = collective_summary(plan.step.collectives)
    sizes: dict[str, int] = {}
    for row in summary["collectives"]:
        name = f"{'+'.join(row['axes']) or 'one device'}, {row['network'].upper()}"
        sizes[name] = sizes.get(name, 0) + (row["wire_bytes"] or 0)
    ordered = sorted(sizes.items(), key=lambda item: -item[1])
    yield "<h2>Sent by a device in a step, by mesh axis and network</h2>"
    yield from bars({name: (size, _size(size)) for name, size in ordered})
    for line in overlap_lines(plan.overlap):
        yield f"<p>{line[0].upper()}{line[1:]}.</p>"
    if summary["conditional_wire_bytes"]:
        yield (
            f"<p>{_size(summary['conditional_wire_bytes'])} of it in branches, counted as if "
            "every one were taken.</p>"
        )


def _roofline(plan: Plan) -> Iterator[str]:
    times = plan.roofline
    parts = {"matmuls": times.compute, "memory": times.hbm, "ICI": times.ici, "DCN": times.dcn}
    if times.bubble:
        parts["waits for stages"] = times.bubble
    if times.host:
        parts["host's memory"] = times.host
    parts["step"] = times.step
    known = {name: (s, _time(s)) for name, s in parts.items() if s is not None}
    if known:
        yield "<h2>Roofline: the least time of a step, by what is busy</h2>"
        yield from bars(known)
        yield (
            f"<p>Bound by {times.bound}. A step takes the longer of matmuls and memory of each "
            "kernel, its waits, and what of the collectives they do not hide.</p>"
        )


def _size(count: float) -> str:
    """Bytes, in powers of ten as networks have them."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.2f} {unit}"
    return f"{count:.0f} B"


def _time(seconds: float) -> str:
    return f"{seconds:.3f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _schedule(plan: Plan) -> Iterator[str]:
    if plan.schedule is None:
        return
    yield "<h2>Pipeline: what each stage does, time to the right</h2><div class='wide'>"
    yield schedule_svg(plan.schedule)
    yield (
        "</div><p>F: a microbatch forward; B: backward, with the forward pass made again; W: "
        "weight gradients; grey: the stage waits. A number is the microbatch; of chunks on one "
        "device, the second has a '.</p>"
    )
