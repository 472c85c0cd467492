"""Plots: what is drawn lies where the axes say."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.workflows.reporting.plot import FILE, PART, Layout, Series, plot

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
