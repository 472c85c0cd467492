"""The page in a real browser: every image is there, nothing is wider than the window, and nothing is logged."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ssmprune_cli.workflows.reporting import Entry, page

PROBE = """<script>
const copies = [...document.querySelectorAll("image, img")].map(image => {
  const copy = new Image(); // the event "load" waits for it
  copy.src = image.getAttribute("href") || image.src;
  return [image, copy];
});
window.addEventListener("load", () => {
  const faults = [];
  for (const [image, copy] of copies) {
    if (!copy.complete || !copy.naturalWidth) faults.push("an image does not load");
    const box = image.getBoundingClientRect();
    if (!box.width || !box.height) faults.push("an image is not shown");
  }
  for (const svg of document.querySelectorAll(".plot svg, .strip svg")) {
    const box = svg.getBoundingClientRect();
    if (box.width < 100 || box.height < 60) faults.push(`a picture of ${box.width} x ${box.height}`);
  }
  document.querySelectorAll("details").forEach(each => each.open = true);
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) faults.push(`${wide} pixels wide in a window of ${innerWidth}`);
  const scheme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const images = document.querySelectorAll("image").length;
  top.document.title = `${innerWidth} ${scheme}, images ${images}; faults: ${faults.join(", ") || "none"}`;
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_every_image_and_logs_nothing(
    width: int, scheme: str, entry: Callable[[str], Entry], tmp_path: Path
) -> None:
    browser = next((path for name in ("chromium", "google-chrome", "chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    text = page([entry(f"a model with a long name {i}") for i in range(2)]).replace("</body>", PROBE)
    # A frame, as a window of Chromium is at least 500 wide.
    style = f"width:{width}px;height:900px;border:0"
    file = tmp_path / "report.html"
    file.write_text(f'<body style="margin:0"><iframe style="{style}" srcdoc="{html.escape(text)}"></iframe></body>')
    done = subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
            *(["--force-dark-mode"] if scheme == "dark" else []),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1300,1000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (title,) = re.findall("<title>(.*)</title>", done.stdout.split("<body")[0])
    assert title == f"{width} {scheme}, images 2; faults: none"
    assert "CONSOLE" not in done.stderr, done.stderr
