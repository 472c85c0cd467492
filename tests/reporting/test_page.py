"""The page: self-contained, safe with any name, complete, in order for screen readers, with enough contrast."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.report.report import Report, SampleStage
from ssmprune_cli.tasks.classification import Classification
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.reporting import Entry, page, read_entries, summary
from ssmprune_cli.workflows.reporting.drawn import front_figures, pareto
from ssmprune_cli.workflows.reporting.facts import side_by_side, unlike
from ssmprune_cli.workflows.reporting.page import _dropped_path, _hatch_path
from ssmprune_cli.workflows.reporting.plot import COLOURS

MakeEntry = Callable[[str], Entry]
VOID = {"meta", "link", "br", "img"}
CSS = Path(sys.modules[Entry.__module__].__file__ or "").with_name("page.css")
LANDMARKS = {"header", "nav", "main", "footer"}


class Checker(HTMLParser):
    """Collects ids, addresses, headings, names of landmarks and groups, and text; tags must close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.headings: list[int] = []
        self.landmarks: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            assert not key.startswith("on")
            if key == "id":
                self.ids.append(value or "")
            if key in {"href", "src", "xlink:href"}:
                self.addresses.append(value or "")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag in LANDMARKS:
            self.landmarks.append(tag)
        if values.get("role") in {"img", "group"}:
            assert (values.get("aria-label") or "").strip(), (tag, attrs)  # a text for those who do not see it
        if "scroll" in (values.get("class") or "").split():
            assert values.get("tabindex") == "0"  # scrolls from the keyboard, too

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data.replace("\u00a0", " ")  # numbers and their units stay together
        if "th" in self.open[-1:]:
            assert data.strip()


def checked(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and len(set(checker.ids)) == len(checker.ids)
    for address in checker.addresses:
        assert address.startswith("data:") or address[1:] in checker.ids, address
    assert "url(" not in html and "@import" not in html
    assert "></th>" not in html
    assert checker.headings[0] == 1 and checker.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(checker.headings, checker.headings[1:], strict=False))
    assert html.startswith('<!doctype html>\n<html lang="en">')
    return checker


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_needs_nothing_else_survives_any_name_and_holds_everything(
    count: int, entry: MakeEntry, hostile: str
) -> None:
    checker = checked(page([entry(f"model {i} {hostile}") for i in range(count)]))
    assert checker.landmarks == (["header", "main", "footer"] if count == 1 else ["header", "nav", "main", "footer"])
    text = re.sub(r"\s+", " ", checker.text)
    assert text.count('<script>alert("x")') >= 4 * count  # shown, not run
    for fact in (
        "25.0 % fewer multiply-adds, top-1 -25.00 points",
        "75.00 % (50.0 to 90.0)",  # top-1 with its interval
        "(-50.00 to +10.00)",
        "90.00 % (59.6 to 98.2)",  # top-5: Wilson's interval of 9 in 10
        "multiply-adds, all directions",
        "multiply-adds, one direction",
        "-20.0 % (-25.0 to +0.0)",  # latency, with the quartiles of its rounds
        "+25.0 % (+0.0 to +33.3)",  # images per second
        "2500.0 (1600.0 to 2500.0)",
        "1.0 MiB",
        "p = 0.5",
        "Tokens that enter each block",
        "Multiply-adds of each block",
        "Where the time goes",
        "need at least 2.0 ms (50 % of the time it takes)",
        "Sensitivity",
        "15 settings on all search images",
        "chosen",
        "not finite",
        "class 1: the dense model says class 1 (right), the pruned one",
        "(wrong)",
        "after block 1: 2 of 4",
        "-30.0 points",
        "62.5 %",  # calibration: the share of the score that is kept
        "top-1 on the validation images, fine-tuned",
        "Every epoch",
        "its SHA-256",
    ):
        assert text.count(fact) >= count, fact
    assert "gained" not in text  # it lost nothing


def test_no_table_is_there_twice(entry: MakeEntry) -> None:
    """No two tables have the same first row, and no figure of the table before and after is drawn beside it."""
    html = page([entry("a")])
    tables = [re.findall(r"<t[dh].*?</t[dh]>", table)[4:9] for table in re.findall(r"<table>.*?</table>", html, re.S)]
    assert len(tables) > 4 and len({str(table) for table in tables}) == len(tables)
    assert re.sub(r"\s|&nbsp;|\u00a0", "", html).count("1.0MiB") == 2  # dense and pruned, once each


def test_gains_and_losses_are_told_apart_by_words_too(entry: MakeEntry) -> None:
    made = entry("a")
    accuracy, speed = made.report.accuracy, made.report.speed
    assert accuracy is not None and speed is not None

    def cells(lost: tuple[float, float], ratio: tuple[float, float]) -> list[tuple[str, str]]:
        changed = {
            "accuracy": accuracy.model_copy(update={"difference_interval": lost}),
            "speed": speed.model_copy(update={"latency_ratio_interval": ratio}),
        }
        html = page([Entry("a", made.report.model_copy(update=changed), made.images)])
        return re.findall(r'<td class="(gain|loss|even)">[^<]*(?:<span class="mark">(\w+)</span>)?', html)[:8]

    # top-1, top-5 (no interval), fine-tuned top-1, multiply-adds (two), bytes moved, latency, images per second
    better, worse, level = ("gain", "better"), ("loss", "worse"), ("even", "")
    assert cells((-0.5, -0.1), (0.7, 0.9)) == [worse, level, level, better, better, worse, better, better]
    assert cells((0.1, 0.5), (1.1, 1.2)) == [better, level, level, better, better, worse, worse, worse]
    assert cells((-0.5, 0.1), (0.9, 1.1)) == [level, level, level, better, better, worse, level, level]


def test_how_samples_were_chosen_is_said(entry: MakeEntry) -> None:
    made = entry("a")
    (sample,) = made.report.samples
    changed = sample.model_copy(update={"chosen": "changed"})
    for drawn, words in (
        ((sample,), "The images are random ones."),
        ((changed, sample), "The first of the 2 images was chosen because its answer changed; the others are random"),
        ((changed, changed, sample, sample), "The first 2 of the 4 images were chosen because their answers changed;"),
    ):
        report = made.report.model_copy(update={"samples": drawn})
        assert words in checked(page([Entry("a", report, made.images)])).text


def test_a_report_with_next_to_nothing_says_so(entry: MakeEntry) -> None:
    full = entry("dense")
    bare = Report(family="vim", image_size=(8, 8), parameters=10, dense=full.report.dense)
    checker = checked(page([Entry("dense", bare, {})]))
    assert "dense: all tokens kept" in checker.text and "2e-06 G multiply-adds with all directions" in checker.text
    pruned = bare.model_copy(update={"pruning": full.report.pruning, "pruned": full.report.pruned})
    text = checked(page([Entry("pruned", pruned, {})])).text
    assert "Accuracy was not measured" in text and "Speed and memory were not measured" in text
    accuracy = full.report.accuracy
    assert accuracy is not None
    kept = accuracy.model_copy(update={"classes": accuracy.classes[1:]})
    unharmed = pruned.model_copy(update={"accuracy": kept})
    assert "No class has fewer right answers" in checked(page([Entry("pruned", unharmed, {})])).text


def test_a_wide_model_has_wide_pictures(entry: MakeEntry) -> None:
    wide = entry("wide")
    report = wide.report.model_copy(update={"image_size": (8, 16)})
    html = page([Entry("wide", report, wide.images)])
    assert 'viewBox="0 0 200.000 100"' in html and "scale(100.000000 50.000000)" in html


def test_the_summary_keeps_its_tables_in_order(entry: MakeEntry) -> None:
    text = summary([entry("a|b"), entry("c")])
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "a\\|b" in text and "-25.00 points (-50.00 to +10.00)" in text and "(-30.0 points, 10 images)" in text
    assert "\n\n\n" not in text


# --- several reports


@pytest.mark.parametrize(
    ("ratio", "interval", "words"),
    [
        (0.8, (0.75, 0.9), "1.25 times as fast, 25.0 % fewer multiply-adds"),
        (1.1, (1.05, 1.2), "slower, 1.10 times the time, 25.0 % fewer multiply-adds"),
        (0.98, (0.9, 1.0), "no faster, as far as the timing tells, 25.0 %"),
        (None, None, "speed not measured, 25.0 %"),
    ],
)
def test_the_first_line_says_whether_it_is_faster(entry: MakeEntry, ratio: Any, interval: Any, words: str) -> None:
    made = entry("a")
    assert made.report.speed is not None
    speed = made.report.speed.model_copy(update={"latency_ratio": ratio, "latency_ratio_interval": interval})
    report = made.report.model_copy(update={"speed": speed if ratio else None})
    text = summary([Entry("a", report, made.images)])
    assert text.startswith(f"# a: {words}") and "saves time" not in text
    shown = checked(page([Entry("a", report, made.images)])).text
    first = [line for line in shown.partition("Skip to the report")[2].splitlines() if line.strip()][:2]
    verdict = {
        0.8: "Faster: 1.25 times",
        1.1: "Slower: 0.91 times",
        0.98: "No faster, as far as",
        None: "Speed was not",
    }
    assert first[0] == "a" and first[1].startswith(verdict[ratio])
    if ratio is not None:
        assert f"takes {ratio:.2f} times the time and 1.00 times the memory" in text
    assert words in checked(page([Entry("a", report, made.images)])).text.replace("\u00a0", " ")


def test_verdicts_are_on_the_page_and_in_the_summary(entry: MakeEntry) -> None:
    made = entry("a")
    accuracy = made.report.accuracy
    asked = Limits(max_drop=30.0, max_flops=0.8)
    limits = asked.check(Classification(), score=accuracy, comparison=accuracy, flops=0.75)
    limited = Entry("a", made.report.model_copy(update={"limits": limits}), made.images)
    text, shown = summary([limited]), checked(page([limited])).text.replace("\u00a0", " ")
    drop = "top-1 fell by 25.00 points (95 % interval -10.00 to 50.00, judged by its upper end); --max-drop allows 30"
    for form in (text, shown):
        assert "FAIL: 1 of 2 limits is broken." in form and f"FAIL: {drop}." in form
        assert "PASS: 0.7500 of the dense multiply-adds are left; --max-flops allows 0.8" in form
    assert text.splitlines()[2] == "**FAIL: 1 of 2 limits is broken.**"
    both = summary([limited, entry("b")])
    assert "| limits |" in both and "| FAIL |" in both and "FAIL" not in summary([entry("a"), entry("b")])
    kept = limits[1:]
    passed = Entry("a", made.report.model_copy(update={"limits": kept}), made.images)
    assert "PASS: the limit is kept." in summary([passed])


def test_there_is_no_front_over_two_datasets(entry: MakeEntry) -> None:
    one = entry("one").report
    on_a, on_b = (
        one.model_copy(update={"provenance": {**one.provenance, "evaluation_sha256": each}}) for each in ("a", "b")
    )
    assert front_figures([("one", on_a), ("two", on_a)]) and not front_figures([("one", on_a), ("two", on_b)])
    assert unlike([on_a, on_a]) == [] and unlike([on_a, on_b]) == ["Accuracy was measured on different images."]
    assert one.accuracy is not None
    other = one.model_copy(update={"accuracy": one.accuracy.model_copy(update={"count": 11})})
    assert not front_figures([("one", one), ("two", other)])  # without what they say, their counts tell


def test_the_front_is_what_nothing_beats() -> None:
    points = [(1.0, 50.0), (2.0, 40.0), (2.0, 60.0), (3.0, 60.0), (4.0, 70.0)]
    assert pareto(points, less=True) == [(1.0, 50.0), (2.0, 60.0), (4.0, 70.0)]
    assert pareto(points, less=False) == [(4.0, 70.0)]
    assert pareto([], less=True) == []


def test_speed_is_over_the_dense_model_if_that_is_the_same(entry: MakeEntry) -> None:
    one = entry("one").report
    other = one.model_copy(update={"provenance": {"input_sha256": "def"}})
    alike, unalike = (front_figures([("a", one), ("b", each)]) for each in (one, other))
    assert "times the dense model" in alike[1].svg and ">a: 1.25, 50<" in alike[1].svg
    assert "images per second" in unalike[1].svg and ">a: 2500, 50<" in unalike[1].svg
    assert [name for _, name in alike[0].legend] == ["dense", "a", "b", "Pareto front"]
    without = one.model_copy(update={"speed": None})
    assert len(front_figures([("a", one), ("b", without)])) == 1
    assert front_figures([("a", one.model_copy(update={"accuracy": None}))]) == []


def test_what_cannot_be_compared_is_said(entry: MakeEntry) -> None:
    one = entry("one").report
    assert one.accuracy is not None and one.speed is not None
    assert unlike([one, one]) == []
    more = one.model_copy(update={"accuracy": one.accuracy.model_copy(update={"count": 11})})
    assert unlike([one, more]) == ["Accuracy was measured on different images."]
    threads = one.model_copy(update={"speed": one.speed.model_copy(update={"threads": 1})})
    assert "Speed was measured in different ways" in unlike([one, threads])[0]
    unjudged = one.model_copy(update={"accuracy": None, "speed": None})
    assert "not measured for all" in unlike([one, unjudged])[0]
    _, (_, line) = side_by_side([("one", one), ("unjudged", unjudged)])
    assert line == ["unjudged", "75.0 %", "-", "-", "-", "-"]


def test_names_are_as_long_as_they_must_be(entry: MakeEntry, tmp_path: Path) -> None:
    made = entry("x")
    folders = [tmp_path / "a" / "last", tmp_path / "b" / "last", tmp_path / "b" / "best"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(made.report.to_json())
        (folder / "sample.png").write_bytes(made.images["sample.png"])
    assert [each.name for each in read_entries(folders)] == ["a/last", "b/last", "b/best"]
    assert [each.name for each in read_entries(folders[1:])] == ["last", "best"]
    assert [each.name for each in read_entries(folders[:1] * 2)] == ["last", "last"]
    with pytest.raises(SsmpruneError, match="is no folder") as raised:
        read_entries([tmp_path / "b"])
    assert raised.value.hint == f"Give one of {tmp_path / 'b' / 'best'}, {tmp_path / 'b' / 'last'}."


# --- colours and pictures


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of #rgb or #rrggbb."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_figures_stand_out_on_every_ground() -> None:
    """WCAG 2.2, level AA: 4.5 for text, 3 for what a figure is read by; light, dark and printed."""
    css = CSS.read_text(encoding="utf-8")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    ]
    assert len(schemes) == 3
    for scheme in schemes:
        for ground in (scheme["paper"], scheme["card"]):
            assert min(contrast(scheme[ink], ground) for ink in ("ink", "soft", "pruned", "gain", "loss")) >= 4.5
            assert min(contrast(colour, ground) for colour in (*COLOURS, scheme["dense"])) >= 3
        assert contrast(scheme["note-ink"], scheme["note"]) >= 4.5


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_the_shade_covers_exactly_the_dropped_patches(kept: Any) -> None:
    rows, columns = kept.shape
    stage = SampleStage(after_block=1, grid=(rows, columns), kept=tuple(np.flatnonzero(kept).tolist()))
    covered = np.zeros((rows, columns), int)
    for left, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", _dropped_path(stage)):
        covered[int(row), int(left) : int(left) + int(width)] += 1
    np.testing.assert_array_equal(covered, ~kept)
    lines = {(int(bottom) - 1, int(left)) for left, bottom in re.findall(r"M(\d+) (\d+)l1-1", _hatch_path(stage))}
    assert lines == set(zip(*np.nonzero(~kept), strict=True))
