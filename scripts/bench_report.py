"""The bench's answer: medians and spreads, a Markdown table and a plot."""

from __future__ import annotations

import html
import pathlib
import statistics
from collections.abc import Mapping
from typing import Any

from sections import write_section

BASE = "trainer"


def summarize(rounds: Mapping[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians and spreads of one shape.

    Args:
        rounds: peer to a list, a time that it ran an entry: figures by name.

    Returns:
        Of each peer and figure: median, min, max.
    """

    def spread(values: list[float]) -> dict[str, float]:
        return {"median": statistics.median(values), "min": min(values), "max": max(values)}

    return {
        peer: {name: spread([r[name] for r in of_peer]) for name in of_peer[0]}
        for peer, of_peer in rounds.items()
    }


def _by_speed(answer: Mapping[str, Any]) -> list[str]:
    """The peers that ran, the fastest (in the first shape) first."""
    peers = next(iter(answer["shapes"].values()))["peers"]
    return sorted(peers, key=lambda peer: -peers[peer]["tokens_per_second"]["median"])


def markdown(answer: Mapping[str, Any]) -> str:
    """The table: ratios first; then what did not run and why, and the machine."""

    def cell(spread: Mapping[str, float], digits: int) -> str:
        median, low, high = (f"{spread[n]:,.{digits}f}" for n in ("median", "min", "max"))
        return f"{median} ({low} to {high})"

    shapes, labels = answer["shapes"], answer["labels"]
    head = ["", *(f"{s}: trainer / it" for s in shapes), *(f"{s}: tokens/s" for s in shapes)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for peer in _by_speed(answer):
        of_shapes = [shape["peers"][peer] for shape in shapes.values()]
        cells = [
            f"**{labels[peer]}**" if peer == BASE else labels[peer],
            *("" if peer == BASE else cell(s["trainer_over"], 3) for s in of_shapes),
            *(cell(s["tokens_per_second"], 0) for s in of_shapes),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for peer, why in answer["missing"].items():
        lines.append(f"| {labels[peer]} | not run: {why} |" + " |" * (len(head) - 2))
    differences = ", ".join(f"{s['loss_difference']:.1e} ({n})" for n, s in shapes.items())
    told = ", ".join(f"{name} {value}" for name, value in answer["machine"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"Median (lowest to highest); rounds: {answer['num_rounds']}. "
            f"Largest relative difference of a loss: {differences}. {told}.",
            "",
        ]
    )


def plot(answer: Mapping[str, Any]) -> str:
    """An SVG: a panel a shape, a bar a peer, a line from the slowest round to the fastest."""
    width, left, height, gap = 340, 190, 24, 34
    peers = _by_speed(answer)
    shapes = answer["shapes"]
    total_width = left + len(shapes) * (width + 20)
    total_height = gap + len(peers) * height + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total_width} {total_height}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{total_width}" height="{total_height}" fill="white"/>',
    ]
    for row, peer in enumerate(peers):
        label = html.escape(answer["labels"][peer])
        y = gap + row * height + 16
        parts.append(f'<text x="{left - 8}" y="{y}" text-anchor="end">{label}</text>')
    for column, (name, shape) in enumerate(shapes.items()):
        x0 = left + column * (width + 20)
        rates = {peer: shape["peers"][peer]["tokens_per_second"] for peer in peers}
        scale = (width - 60) / max(rate["max"] for rate in rates.values())
        parts.append(f'<text x="{x0}" y="20" font-weight="bold">{name}, tokens/s</text>')
        for row, peer in enumerate(peers):
            y, rate = gap + row * height, rates[peer]
            low, middle, high = (scale * rate[n] for n in ("min", "median", "max"))
            color = "#d9730d" if peer == BASE else "#9bb4d0"
            parts += [
                f'<rect x="{x0}" y="{y}" width="{middle:.1f}" height="{height - 6}" '
                f'fill="{color}"/>',
                f'<path d="M{x0 + low:.1f} {y + 9}H{x0 + high:.1f}" stroke="black"/>',
                f'<text x="{x0 + high + 5:.1f}" y="{y + 14}">{rate["median"]:,.0f}</text>',
            ]
    return "\n".join([*parts, "</svg>", ""])


def write_page(path: pathlib.Path, answer: Mapping[str, Any]) -> None:
    """Writes a Markdown page's section of these shapes anew, and the plot beside it."""
    shapes = "-".join(answer["shapes"])
    picture = path.with_name(f"{path.stem}_{shapes}.svg")
    picture.write_text(plot(answer))
    text = f"{markdown(answer)}\n![tokens per second]({picture.name})\n"
    write_section(path, f"Tokens per second: {', '.join(answer['shapes'])}", text)
