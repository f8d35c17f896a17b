"""HTML pages that need nothing else: one style, bars and line charts, no script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence

COLORS = (
    "#2f5d8a",
    "#5b8a3c",
    "#b0722b",
    "#8a4f7d",
    "#6b6b6b",
    "#3c8a86",
    "#8a7a2f",
    "#d9b44a",
    "#a40000",
    "#9a9a9a",
)
_STYLE = """
:root{color-scheme:light dark;--ink:#1a1a1a;--page:#fff;--track:#f2f2f2;--grid:#e2e2e2;
--bad:#a40000;--good:#1a6b1a}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--page:#17191c;--track:#2b2e33;
--grid:#3b3f45;--bad:#ff8078;--good:#7bd389}}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:var(--ink);background:var(--page)}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin-top:2rem}
.bar{display:flex;height:2rem;border:1px solid #888;background:var(--track)}
.bar span{display:block;overflow:hidden;color:#fff;font-size:.75rem;padding:.3rem 0 0 .3rem;
white-space:nowrap;text-overflow:ellipsis;box-sizing:border-box}
.bar span:empty{padding:0}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .8rem .2rem 0;text-align:left}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:minmax(6rem,13rem) 1fr 7rem;gap:.6rem;align-items:center;
margin:.2rem 0;overflow-wrap:anywhere}
.row div{background:var(--track)}.row i{display:block;height:1.1rem}
.row .n{text-align:right;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}.wide svg{width:auto}
pre{overflow-x:auto;background:var(--track);padding:1rem;font-size:.8rem}
.no{color:var(--bad);font-weight:600}.yes{color:var(--good);font-weight:600}
svg{width:100%;height:auto;font:11px system-ui,sans-serif}
.chart{fill:currentColor}.grid{stroke:var(--grid)}
"""
_BAR_LETTERS = 140  # Of the labels' size, in a bar of the page's full width.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM, _TOP = 900, 260, 64, 20, 24, 8
_MOST_POINTS = 800


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document.

    Args:
        title: plain text.
        parts: HTML of the body, below the title.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>" + "".join(parts) + "</body></html>\n"
    )


def stacked_bar(values: Mapping[str, float], *, whole: float, unit: str) -> Iterator[str]:
    """Parts of a whole, side by side, each with its name where there is room.

    Args:
        values: name to size.
        whole: what the bar's full width stands for.
        unit: of the sizes, for the tooltip.
    """
    yield "<div class='bar'>"
    for color, (name, value) in zip(COLORS, values.items(), strict=False):
        if not value:
            continue
        shown, digits = html.escape(name), 0 if value >= 100 else 2
        share = value / (whole or 1)
        label = shown if share * _BAR_LETTERS > len(name) + 1 else ""
        yield (
            f"<span style='width:{100 * share:.2f}%;background:{color}' "
            f"title='{shown}: {value:,.{digits}f} {unit}'>{label}</span>"
        )
    yield "</div>"


def bars(values: Mapping[str, tuple[float, str]]) -> Iterator[str]:
    """Bars below each other, the longest as wide as there is room.

    Args:
        values: name to size, and the size as people read it.
    """
    largest = max((size for size, _ in values.values()), default=0) or 1.0
    for i, (name, (size, text)) in enumerate(values.items()):
        yield (
            f"<div class='row'><span>{html.escape(name)}</span><div><i style='width:"
            f"{100 * size / largest:.2f}%;background:{COLORS[i % len(COLORS)]}'></i></div>"
            f"<span class='n'>{html.escape(text)}</span></div>"
        )


def line_chart(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    marks: Sequence[float] = (),
    logarithmic: bool = False,
) -> Iterator[str]:
    """Lines over a common axis; what is not finite is a gap.

    Args:
        series: name to (x, y), x rising.
        marks: where x has a dashed vertical line.
        logarithmic: both axes are; all values are above 0.
    """
    drawn = {name: _thinned(points) for name, points in series.items() if points}
    flat = [point for points in drawn.values() for point in points if _drawable(point[1])]
    if not flat:
        yield "<p>Nothing was measured yet.</p>"
        return
    x_low, x_high = _range([x for x, _ in flat])
    y_low, y_high = _range([y for _, y in flat])

    def share(value: float, low: float, high: float) -> float:
        if logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return (value - low) / (high - low)

    def at_x(x: float) -> float:
        return _LEFT + share(x, x_low, x_high) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - share(y, y_low, y_high) * (_HEIGHT - _BOTTOM - _TOP)

    yield f"<svg class='chart' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img'>"
    ticks = _powers if logarithmic else _ticks
    for y in ticks(y_low, y_high):
        yield (
            f"<path d='M{_LEFT} {at_y(y):.1f}H{_WIDTH - _RIGHT}' class='grid'/>"
            f"<text x='{_LEFT - 6}' y='{at_y(y) + 4:.1f}' text-anchor='end'>{_short(y)}</text>"
        )
    for x in ticks(x_low, x_high):
        yield (f"<text x='{at_x(x):.1f}' y='{_HEIGHT - 6}' text-anchor='middle'>{_short(x)}</text>")
    for x in marks:
        if x_low <= x <= x_high:
            yield (
                f"<path d='M{at_x(x):.1f} {_TOP}V{_HEIGHT - _BOTTOM}' stroke='#a40000' "
                f"stroke-dasharray='3 3'><title>restart at step {_short(x)}</title></path>"
            )
    # Where lines seldom are: what grows with the size begins at the lower left.
    legend, anchor = (_LEFT + 8, "start") if logarithmic else (_WIDTH - _RIGHT - 4, "end")
    for i, (name, points) in enumerate(drawn.items()):
        color = COLORS[i % len(COLORS)]
        path, pen = [], "M"
        for x, y in points:
            if not _drawable(y):
                pen = "M"
                continue
            path.append(f"{pen}{at_x(x):.1f} {at_y(y):.1f}")
            pen = "L"
        yield (
            f"<path d='{''.join(path)}' fill='none' stroke='{color}' stroke-width='1.5' "
            "stroke-linejoin='round'/>"
        )
        if len(points) <= 40:  # Few, or alone: a line of one point would not be seen.
            for x, y in points:
                if _drawable(y):
                    yield f"<circle cx='{at_x(x):.1f}' cy='{at_y(y):.1f}' r='2.5' fill='{color}'/>"
        yield (
            f"<text x='{legend}' y='{_TOP + 12 + 14 * i}' text-anchor='{anchor}' "
            f"fill='{color}'>{html.escape(name)}</text>"
        )
    yield "</svg>"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most so many points, with the highest and lowest of those left out."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (_MOST_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        finite = [point for point in part if _drawable(point[1])]
        if len(finite) < len(part):
            kept.append((part[0][0], math.nan))
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else ()
        kept += sorted(ends)
    return kept


def _drawable(y: float) -> bool:
    return abs(y) < 1e100  # No NaN either.


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-100):
        margin = abs(low) / 10 or 1.0
        return low - margin, high + margin
    return low, high


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * n for n in (1, 2, 5, 10) if power * n >= raw)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """The powers of two in a range, some of them where there are many."""
    first, last = math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9)
    step = max(math.ceil((last - first) / 10), 1)
    return [2.0**n for n in range(first, last + 1, step)]


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * size or (unit != "k" and abs(value) >= size):
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"
