"""Names of files that are no text, from --calib to --out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"


def test_names_that_are_not_utf8_go_all_the_way(ssmprune: Run, tmp_path: Path) -> None:
    folder, source, out = (tmp_path / os.fsdecode(name) for name in (b"calib_\xff", b"vim_\xfe.pth", b"out_\xfd"))
    folder.mkdir()
    for index in range(2):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / os.fsdecode(b"image_\xfc%d.png" % index))
    shutil.copy(CHECKPOINT, source)
    options = ("--keep", "0.6", "--calib", folder, "--calib-images", "2", "--samples", "1", "--out", out, "--json")
    done = ssmprune("compress", source, *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["provenance"]["input"] == r"vim_\udcfe.pth"
    assert r"out_\udcfd" in done.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert report["samples"][0]["name"].startswith(r"image_\udcfc")
    assert ssmprune("inspect", out).returncode == 0
