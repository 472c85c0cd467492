"""The picture of the demo's report in the README: at desktop and phone width, light and dark.

    python recipes/demo/screenshots.py demo-out/vim_digits_k60/report.html recipes/demo/report.png [--browser chromium]

Needs Chromium. Its window is at least 500 pixels wide, so the phone is a frame of 390 in a page of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

HEIGHT, GAP = 1500, 16
DESKTOP, PHONE, WINDOW = 1000, 390, 500
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync")


def shot(browser: str, page: Path, folder: Path, width: int, *, dark: bool) -> Image.Image:
    file = folder / f"{page.stem}_{width}_{dark}.png"
    profile = f"--user-data-dir={folder / 'profile'}"
    size = f"--window-size={width},{HEIGHT}"
    scheme = ["--force-dark-mode"] if dark else []
    command = [browser, *FLAGS, *scheme, profile, size, f"--screenshot={file}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(file) as image:
        return image.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--browser", default="chromium")
    arguments = parser.parse_args()
    report = arguments.report.resolve()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        frame = folder / "phone.html"
        style = f"width:{PHONE}px;height:{HEIGHT}px;border:0"
        frame.write_text(f'<body style="margin:0"><iframe src="{report.as_uri()}" style="{style}"></iframe>')
        parts = []
        for dark in (False, True):
            parts.append(shot(arguments.browser, report, folder, DESKTOP, dark=dark))
            parts.append(shot(arguments.browser, frame, folder, WINDOW, dark=dark).crop((0, 0, PHONE, HEIGHT)))
    canvas = Image.new("RGB", (sum(part.width for part in parts) + GAP * (len(parts) - 1), HEIGHT), "#808080")
    left = 0
    for part in parts:
        canvas.paste(part, (left, 0))
        left += part.width + GAP
    # Two thirds of the size and 128 colours: text stays readable, and the file small.
    small = canvas.resize((canvas.width * 2 // 3, canvas.height * 2 // 3), Image.Resampling.LANCZOS)
    small.quantize(128).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
