"""The page: self-contained, safe with any name, complete; and in a real browser, without a fault."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from ssmprune_cli.report import (
    AccuracyFacts,
    ClassChange,
    Figures,
    ModelAccuracy,
    ModelSpeed,
    PruningFacts,
    Report,
    Sample,
    SampleStage,
    SpeedFacts,
)
from ssmprune_cli.workflows.reporting import Entry, page, summary
from ssmprune_cli.workflows.reporting.page import _dropped_path

HOSTILE = '<script>alert("x")</script>&amp;|"\'.png'
VOID = {"meta", "link", "br", "img"}


def entry(name: str, tmp_path: Path) -> Entry:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "sample.png")
    speed = ModelSpeed(
        median_ms=4.0,
        quartiles_ms=(3.0, 5.0),
        images_per_second=2000.0,
        peak_memory_bytes=2**20,
        time_ms={"scan": 3.0, "other": 1.0},
        floor_ms=2.0,
    )
    report = Report(
        family="vim",
        image_size=(8, 8),
        parameters=10,
        pruning=PruningFacts(points=(1,), keep=0.5, tokens=(2,), importance="clip", reduction="drop", alignment="none"),
        dense=Figures(
            multiply_adds_all_directions=2000,
            multiply_adds_one_direction=1000,
            tokens_per_block=(4, 4),
            multiply_adds_per_block=(1000, 1000),
        ),
        pruned=Figures(
            multiply_adds_all_directions=1500,
            multiply_adds_one_direction=800,
            tokens_per_block=(4, 2),
            multiply_adds_per_block=(1000, 500),
        ),
        accuracy=AccuracyFacts(
            count=10,
            top1=0.5,
            top5=None,
            interval=(0.2, 0.8),
            dense=ModelAccuracy(top1=0.75, top5=None, interval=(0.5, 0.9)),
            difference=-0.25,
            difference_interval=(-0.5, 0.1),
            p_value=0.5,
            classes=(ClassChange(index=3, name=HOSTILE, images=10, right_dense=8, right_pruned=5),),
        ),
        speed=SpeedFacts(
            batch_size=8, rounds=3, device="cpu", threads=2, backend="cpu", dense=speed, pruned=speed, latency_ratio=1.0
        ),
        samples=(
            Sample(
                name=HOSTILE,
                file="sample.png",
                predicted_dense=1,
                predicted_pruned=2,
                stages=(SampleStage(after_block=1, grid=(2, 2), kept=(0, 3)),),
            ),
        ),
        warnings=(HOSTILE,),
        provenance={"input": HOSTILE, "command": HOSTILE},
    )
    return Entry(name, report, {"sample.png": (tmp_path / "sample.png").read_bytes()})


class Checker(HTMLParser):
    """Collects ids, addresses and text; tags must close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag != "script"
        if tag not in VOID:
            self.open.append(tag)
        for key, value in attrs:
            assert not key.startswith("on")
            if key == "id":
                self.ids.append(value or "")
            if key in {"href", "src", "xlink:href"}:
                self.addresses.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("count", [1, 3])
def test_the_page_needs_nothing_else_and_survives_any_name(count: int, tmp_path: Path) -> None:
    html = page([entry(f"model {i} {HOSTILE}", tmp_path) for i in range(count)])
    checker = Checker()
    checker.feed(html)
    assert checker.open == [] and len(set(checker.ids)) == len(checker.ids)
    for address in checker.addresses:
        assert address.startswith("data:") or address[1:] in checker.ids, address
    assert "url(" not in html and "@import" not in html
    assert checker.text.count('<script>alert("x")') >= 4 * count  # shown, not run
    text = checker.text.replace("\u00a0", " ")  # numbers and their units stay together
    for fact in ("25.0 % fewer multiply-adds", "-25.00 points", "75.00 %", "-30.0 points", "1.0 MiB", "2 of 4"):
        assert fact in text, fact


def test_the_summary_keeps_its_tables_in_order(tmp_path: Path) -> None:
    text = summary([entry("a|b", tmp_path), entry("c", tmp_path)])
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1
    assert "a\\|b" in text and "-25.00 points" in text


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_the_shade_covers_exactly_the_dropped_patches(kept: Any) -> None:
    rows, columns = kept.shape
    stage = SampleStage(after_block=1, grid=(rows, columns), kept=tuple(np.flatnonzero(kept).tolist()))
    covered = np.zeros((rows, columns), int)
    for left, row, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", _dropped_path(stage)):
        covered[int(row), int(left) : int(left) + int(width)] += 1
    np.testing.assert_array_equal(covered, ~kept)


PROBE = """<script>
window.addEventListener("load", async () => {
  const faults = [];
  for (const image of document.querySelectorAll("image, img")) {
    const copy = new Image();
    copy.src = image.getAttribute("href") || image.src;
    await copy.decode().catch(() => faults.push("an image does not load"));
    const box = image.getBoundingClientRect();
    if (!box.width || !box.height) faults.push("an image is not shown");
  }
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`${wide} pixels wide in a window of ${innerWidth}`);
  document.title = `images ${document.querySelectorAll("image").length}; faults: ${faults.join(", ") || "none"}`;
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 500])  # a window of Chromium is at least 500 wide
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_image_and_logs_nothing(width: int, scheme: str, tmp_path: Path) -> None:
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    file = tmp_path / "report.html"
    file.write_text(page([entry(str(i), tmp_path) for i in range(2)]).replace("</body>", PROBE))
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000"),
            *(["--force-dark-mode"] if scheme == "dark" else []),
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert "<title>images 2; faults: none</title>" in done.stdout, re.findall("<title>.*</title>", done.stdout)
    assert "CONSOLE" not in done.stderr, done.stderr
