"""Plots: what is drawn lies where the axes say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.workflows.reporting.by_length import length_plot
from ssmprune_cli.workflows.reporting.plot import FILE, PART, ROW, Layout, Panel, Series, plot, stacked
from ssmprune_cli.workflows.scaling import Point, Scaling, Slope

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text: str) -> tuple[dict[str, tuple[float, float]], dict[float, float], dict[float, float]]:
    """Place of each point by what is written at it, and of each tick by its value, along x and along y."""
    root = ElementTree.fromstring(text)
    points = {}
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            x, y = re.findall(r"[-\d.]+", group.attrib["transform"])
            points[title.text or ""] = (float(x), float(y))
    texts = [(each.text or "", each.attrib) for each in root.iter(f"{SVG}text")]
    lines = [{key: float(each.attrib[key]) for key in ("x1", "y1", "x2", "y2")} for each in root.iter(f"{SVG}line")]
    upright = sorted({each["x1"] for each in lines if each["x1"] == each["x2"]})
    level = sorted({each["y1"] for each in lines if each["y1"] == each["y2"]})
    numbers = [(text, attributes) for text, attributes in texts if re.fullmatch(r"[-+.\de]+", text)]
    x_ticks = {float(t): float(a["x"]) for t, a in numbers if a["text-anchor"] == "middle"}
    y_ticks = {}
    for number, attributes in numbers:
        if attributes["text-anchor"] == "end":
            distances = {abs(line - float(attributes["y"])): line for line in level}
            y_ticks[float(number)] = distances[min(distances)]
    assert all(any(abs(x - line) < 0.11 for line in upright) for x in x_ticks.values())
    return points, x_ticks, y_ticks


@pytest.mark.parametrize("layout", [FILE, PART])
def test_points_lie_at_their_ticks(layout: Layout) -> None:
    text = plot([Series("a", [(1, 10), (3, 40)])], title="t", x_label="x", y_label="y", layout=layout)
    points, x_ticks, y_ticks = drawn(text)
    assert points["a: 1, 10"] == pytest.approx((x_ticks[1], y_ticks[10]), abs=0.11)
    assert points["a: 3, 40"] == pytest.approx((x_ticks[3], y_ticks[40]), abs=0.11)


@given(st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=6))
def test_a_logarithmic_axis_is_even_in_logarithms(values: list[float]) -> None:
    series = Series("a", [(i, value) for i, value in enumerate(values)])
    points, _, ticks = drawn(plot([series], title="t", x_label="x", y_label="y", log_y=True))
    (low, at_low), (high, at_high) = min(ticks.items()), max(ticks.items())
    places = {value: points[f"a: {i}, {value:.4g}"][1] for i, value in enumerate(values)}
    for value, y in {**ticks, **places}.items():
        share = math.log(value / low) / math.log(high / low)
        assert y == pytest.approx(at_low + (at_high - at_low) * share, abs=0.5)
        assert FILE.top - 0.1 <= y <= FILE.top + FILE.height + 0.1


def test_a_value_off_the_tick_is_off_it() -> None:
    points, _, ticks = drawn(
        plot([Series("a", [(0, 0.013), (1, 0.025)])], title="t", x_label="x", y_label="y", log_y=True)
    )
    assert points["a: 0, 0.013"][1] < ticks[0.01] - 10  # 0.01 is below it


def test_series_differ_in_shape_and_a_front_has_no_points() -> None:
    series = [Series("a", [(0, 1)]), Series("b", [(1, 2)]), Series("front", [(0, 1), (1, 2)], marks=False)]
    text = plot(series, title='a "b" <c> & d', x_label="x", y_label="y")
    root = ElementTree.fromstring(text)
    assert root.attrib["aria-label"] == 'a "b" <c> & d'
    assert len(drawn(text)[0]) == 2 and len(list(root.iter(f"{SVG}polyline"))) == 1
    assert len(list(root.iter(f"{SVG}circle"))) == 2  # the first series: its point and its sign in the legend
    part = plot(series, title="t", x_label="x", y_label="y", layout=PART)
    assert ">front<" in text and ">front<" not in part  # a page has its own legend


def polylines(text: str) -> list[list[tuple[float, float]]]:
    lines = [each.attrib["points"].split() for each in ElementTree.fromstring(text).iter(f"{SVG}polyline")]
    return [[(float(x), float(y)) for x, y in (place.split(",") for place in line)] for line in lines]


def test_a_power_is_a_straight_line_and_a_curve_stands_for_the_points() -> None:
    points = [(10.0, 1.0), (100.0, 30.0), (1000.0, 1000.0)]
    curve = [(value, value**1.5 / 10) for value in (10.0, 50.0, 300.0, 1000.0)]
    panel = Panel([Series("a", points, curve=curve)], "t", "x", "y", log_x=True, log_y=True)
    text = stacked([panel], title="t")
    (line,) = polylines(text)
    (x0, y0), *_, (x1, y1) = line
    for x, y in line:
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), abs=0.2)
    places, x_ticks, y_ticks = drawn(text)
    assert len(line) == 4 and places["a: 10, 1"][0] == pytest.approx(x_ticks[10], abs=0.11)
    assert places["a: 1000, 1000"] == pytest.approx((x_ticks[1000], y_ticks[1000]), abs=0.11)


def test_panels_stand_one_below_the_other() -> None:
    panel = Panel([Series("a", [(1, 1), (2, 2)])], "t", "x", "y")
    alone, both = (ElementTree.fromstring(stacked([panel] * count, title="t")) for count in (1, 2))
    height = int(alone.attrib["height"])
    assert int(both.attrib["height"]) == 2 * height and both.attrib["width"] == alone.attrib["width"]
    shifts = [each.attrib["transform"] for each in both.findall(f"{SVG}g") if each.find(f"{SVG}polyline") is not None]
    assert shifts == [f"translate(0.0 {height:.1f})"] and height > ROW.top + ROW.height


def test_the_picture_of_lengths_shows_points_and_fits() -> None:
    """Time that is exactly 3 tokens^1.5, and memory that is exactly 1 MiB and 2 KiB a token: all points are on it."""
    points = tuple(
        Point(tokens, 3 * tokens**1.5, (2.9 * tokens**1.5, 3.1 * tokens**1.5), 5, 7 * tokens, 2**20 + 2048 * tokens)
        for tokens in (64, 512, 4096)
    )
    slopes = {"dense": Slope(1.5, 2048.0)}
    found = Scaling("tokens", (64, 512, 4096), 1, "float32", "cpu", 1, {"dense": points}, slopes)
    text = length_plot(found)
    assert ">dense: tokens^1.50<" in text and ">dense: 2.00 KiB a token<" in text and text.count(">tokens<") == 3
    time, memory, work = polylines(text)
    root = ElementTree.fromstring(text)
    shapes = {}
    for group in root.iter(f"{SVG}g"):
        title = group.find(f"{SVG}title")
        if title is not None:
            shapes[title.text or ""] = tuple(map(float, re.findall(r"[-\d.]+", group.attrib["transform"])))
    for tokens, line, name in (
        *((point.tokens, time, f"dense: tokens^1.50: {point.tokens}, {point.median_ms:.4g}") for point in points),
        *((point.tokens, work, f"dense: {point.tokens}, {point.multiply_adds / 1e9:.4g}") for point in points),
    ):
        x, y = shapes[name]
        assert min(abs(x - px) + abs(y - py) for px, py in line) < 0.3, (tokens, name)
    first = shapes[f"dense: 2.00 KiB a token: 64, {1 + 64 / 512:.4g}"]
    assert memory[0] == pytest.approx(first, abs=0.11) and len(memory) > 10
