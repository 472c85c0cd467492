"""A plot of a few series as an SVG file: points, lines through them, error bars. Needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ssmprune_cli.workflows.write import write_text

_COLOURS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
    "#555555",
    "#ee7733",
    "#009988",
    "#cc3311",
)
_WIDTH, _HEIGHT = 620, 420  # of one plot's frame
_LEFT, _TOP, _LEGEND = 80, 50, 260


@dataclass(frozen=True)
class Series:
    """`points` (x, y); `intervals` (low, high) of y, one a point, or None. With `line` they are joined."""

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] | None = None
    line: bool = True


def write_plot(
    path: Path, series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False
) -> None:
    """Write `plot` to `path`, atomically."""
    write_text(path, plot(series, title=title, x_label=x_label, y_label=y_label, log_y=log_y))


def plot(series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False) -> str:
    """An SVG of `series`. With `log_y`, points that are not positive are left out."""
    shown = [
        (index, each, [i for i, (_, y) in enumerate(each.points) if not log_y or y > 0])
        for index, each in enumerate(series)
    ]
    xs = [each.points[i][0] for _, each, rows in shown for i in rows]
    ys = [each.points[i][1] for _, each, rows in shown for i in rows]
    for _, each, rows in shown:
        for i in rows if each.intervals else ():
            ys += [end for end in (each.intervals or ())[i] if not log_y or end > 0]
    at_x, x_ticks = _axis(xs, _LEFT, _LEFT + _WIDTH, log=False)
    at_y, y_ticks = _axis(ys, _TOP + _HEIGHT, _TOP, log=log_y)
    parts = [_text(_LEFT, 24, title, size=15), _text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 42, x_label, anchor="middle")]
    parts.append(_text(20, _TOP + _HEIGHT / 2, y_label, anchor="middle", turn=True))
    for tick in x_ticks:
        parts.append(_line(at_x(tick), _TOP, at_x(tick), _TOP + _HEIGHT, "#dddddd"))
        parts.append(_text(at_x(tick), _TOP + _HEIGHT + 18, f"{tick:g}", anchor="middle"))
    for tick in y_ticks:
        parts.append(_line(_LEFT, at_y(tick), _LEFT + _WIDTH, at_y(tick), "#dddddd"))
        parts.append(_text(_LEFT - 6, at_y(tick) + 4, f"{tick:g}", anchor="end"))
    for index, each, rows in shown:
        colour = _COLOURS[index % len(_COLOURS)]
        places = [(at_x(each.points[i][0]), at_y(each.points[i][1])) for i in rows]
        if each.line and len(places) > 1:
            joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for i, (x, y) in zip(rows, places, strict=True):
            if each.intervals:
                low, high = (max(end, min(ys)) for end in each.intervals[i])
                parts.append(_line(x, at_y(low), x, at_y(high), colour))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
        row = _TOP + 12 + 18 * index
        parts.append(f'<circle cx="{_LEFT + _WIDTH + 16}" cy="{row - 4}" r="4" fill="{colour}"/>')
        parts.append(_text(_LEFT + _WIDTH + 26, row, each.name))
    height = _TOP + max(_HEIGHT + 60, 18 * len(series) + 20)
    width = _LEFT + _WIDTH + _LEGEND
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(title, {chr(34): "&quot;"})}">\n'
        f'<rect class="paper" width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _axis(
    values: Sequence[float], start: float, stop: float, *, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between `start` and `stop` (pixels), and the values to mark."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high) + 1e-9)
        ticks = [10.0**power for power in range(first, last + 1)]
        return lambda value: start + (stop - start) * (math.log10(max(value, low)) - first) / (last - first), ticks
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 6
    step = next(s for s in (m * 10.0 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)) if s >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(step * i, 10) for i in range(first, last + 1)]
    return lambda value: start + (stop - start) * (value / step - first) / (last - first), ticks


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int = 12, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"{turned}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
