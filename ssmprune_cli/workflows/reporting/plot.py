"""Plots of a few series as SVG: points, lines through them, error bars. Needs no plotting library.

Series differ in colour and in the shape of their points. The colours are between dark and light: they stand out (a
contrast of 3 to 1 or more) on a white page and on a dark one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

from ssmprune_cli.workflows.write import write_text

COLOURS = ("#4477aa", "#d1495b", "#228833", "#8f7000", "#b54a8d", "#11869a", "#777777", "#c05a00", "#7b61c9", "#00806b")
_SHAPES = (  # of a point, around (0, 0)
    '<circle r="4" {0}/>',
    '<path d="M-4-4h8v8h-8z" {0}/>',
    '<path d="M0-5L5 4H-5z" {0}/>',
    '<path d="M0-5L5 0L0 5L-5 0z" {0}/>',
)


@dataclass(frozen=True)
class Series:
    """`points` (x, y); `intervals` (low, high) of y, one a point, or None. Drawn as a `line`, as `marks`, or both.

    curve  (x, y) that the line goes through in the place of the points, such as a fit
    """

    name: str
    points: Sequence[tuple[float, float]]
    intervals: Sequence[tuple[float, float]] | None = None
    line: bool = True
    marks: bool = True
    curve: Sequence[tuple[float, float]] | None = None


@dataclass(frozen=True)
class Panel:
    """What one plot shows. On a logarithmic axis, what is not positive is left out."""

    series: Sequence[Series]
    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False


@dataclass(frozen=True)
class Layout:
    """Sizes in pixels: of the frame, and of what is around it. Without room for a legend there is no title either."""

    width: int
    height: int
    left: int
    top: int
    legend: int
    font: int


FILE = Layout(width=620, height=420, left=80, top=50, legend=260, font=12)  # a picture that stands alone
PART = Layout(width=420, height=260, left=64, top=10, legend=0, font=14)  # of a page that has title and legend
ROW = Layout(width=520, height=240, left=80, top=50, legend=300, font=12)  # of several in one picture


def write_plot(
    path: Path, series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False
) -> None:
    """Write `plot` to `path`, atomically."""
    write_text(path, plot(series, title=title, x_label=x_label, y_label=y_label, log_y=log_y))


def plot(
    series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_y: bool = False, layout: Layout = FILE
) -> str:
    """An SVG of `series`. With `log_y`, points that are not positive are left out."""
    return _svg([_drawn(Panel(series, title, x_label, y_label, log_y=log_y), layout)], title, layout)


def stacked(panels: Sequence[Panel], *, title: str) -> str:
    """An SVG of `panels`, one below the other."""
    return _svg([_drawn(panel, ROW) for panel in panels], title, ROW)


@dataclass(frozen=True)
class _Drawing:
    width: int
    height: int
    body: str


def _svg(drawings: Sequence[_Drawing], title: str, layout: Layout) -> str:
    width, height, rows = max(each.width for each in drawings), 0, []
    for each in drawings:
        rows.append(each.body if not height else _place(0, height, f"\n{each.body}\n"))
        height += each.height
    body = "\n".join(rows)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="{layout.font}" role="img" aria-label={quoteattr(title)}>\n'
        f'<rect class="paper" width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def _drawn(panel: Panel, layout: Layout) -> _Drawing:
    series, left, top, font = panel.series, layout.left, layout.top, layout.font
    right, bottom = left + layout.width, top + layout.height
    shown = [(each, [i for i, point in enumerate(each.points) if _fits(panel, point)]) for each in series]
    curves = [[point for point in each.curve or () if _fits(panel, point)] for each in series]
    places = [each.points[i] for each, rows in shown for i in rows] + [point for curve in curves for point in curve]
    xs, ys = [x for x, _ in places], [y for _, y in places]
    for each, rows in shown:
        for i in rows if each.intervals else ():
            ys += [end for end in (each.intervals or ())[i] if not panel.log_y or end > 0]
    at_x, x_ticks = _axis(xs, left, right, log=panel.log_x)
    at_y, y_ticks = _axis(ys, bottom, top, log=panel.log_y)
    parts = [_text((left + right) / 2, bottom + 3.2 * font, panel.x_label, anchor="middle")]
    parts.append(_text(font + 4, (top + bottom) / 2, panel.y_label, anchor="middle", turn=True))
    for tick in x_ticks:
        parts.append(_line(at_x(tick), top, at_x(tick), bottom, "#dddddd"))
        parts.append(_text(at_x(tick), bottom + 1.5 * font, f"{tick:g}", anchor="middle"))
    for tick in y_ticks:
        parts.append(_line(left, at_y(tick), right, at_y(tick), "#dddddd"))
        parts.append(_text(left - 6, at_y(tick) + font / 3, f"{tick:g}", anchor="end"))
    for index, ((each, rows), curve) in enumerate(zip(shown, curves, strict=True)):
        colour = COLOURS[index % len(COLOURS)]
        line = curve or [each.points[i] for i in rows]
        if each.line and len(line) > 1:
            joined = " ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in line)
            parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        for i in rows if each.marks else ():
            x, y = at_x(each.points[i][0]), at_y(each.points[i][1])
            if each.intervals:
                low, high = (max(end, min(ys)) for end in each.intervals[i])
                parts.append(_line(x, at_y(low), x, at_y(high), colour))
            about = f"{each.name}: {each.points[i][0]:.4g}, {each.points[i][1]:.4g}"
            parts.append(_place(x, y, f"<title>{escape(about)}</title>{mark(index, each)}"))
        if layout.legend:
            row = top + 12 + 18 * index
            parts.append(_place(right + 16, row - 4, mark(index, each)))
            parts.append(_text(right + 28, row, each.name))
    if layout.legend:
        parts.append(_text(left, 24, panel.title, size=15))
    width = right + (layout.legend or 16)
    height = max(bottom + 60, top + 18 * len(series) + 20 if layout.legend else 0)
    return _Drawing(width, height, "\n".join(parts))


def _fits(panel: Panel, point: tuple[float, float]) -> bool:
    return not (panel.log_x and point[0] <= 0) and not (panel.log_y and point[1] <= 0)


def mark(index: int, series: Series) -> str:
    """The sign of the series number `index` around (0, 0), at most 10 x 10: a point, or a line if it has only that."""
    colour = COLOURS[index % len(COLOURS)]
    if not series.marks:
        return f'<path d="M-5 0h10" stroke="{colour}" stroke-width="2"/>'
    return _SHAPES[index % len(_SHAPES)].format(f'fill="{colour}"')


def _axis(
    values: Sequence[float], start: float, stop: float, *, log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value lies between `start` and `stop` (pixels), and the values to mark."""
    low, high = (min(values), max(values)) if values else (0.1, 1.0)
    if log:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        steps = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        bottom = max(step for step in steps if step <= low)
        top = min(step for step in steps if step >= high and step > bottom)
        inside = [step for step in steps if bottom <= step <= top]
        ticks = inside if top / bottom <= 100 else [step for step in inside if step in steps[::3]]  # or powers of ten
        return lambda value: start + (stop - start) * math.log(value / bottom) / math.log(top / bottom), ticks
    if low == high:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 6
    step = next(s for s in (m * 10.0 ** math.floor(math.log10(raw)) for m in (1, 2, 5, 10)) if s >= raw)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(step * i, 10) for i in range(first, last + 1)]
    return lambda value: start + (stop - start) * (value / step - first) / (last - first), ticks


def _place(x: float, y: float, content: str) -> str:
    return f'<g transform="translate({x:.1f} {y:.1f})">{content}</g>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", size: int | None = None, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
    sized = f' font-size="{size}"' if size else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{sized}{turned}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'
