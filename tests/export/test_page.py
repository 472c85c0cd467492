"""The example of docs/export.md runs where there is neither torch nor this package, and gives the model's answer."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmprune_cli.data import prepare_image
from ssmprune_cli.export import Exported
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Preprocessing

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


def test_the_example_runs_without_torch(vim_onnx: tuple[Backbone, Exported], tmp_path: Path) -> None:
    model, made = vim_onnx
    (code,) = re.findall(r"```python\n(import json\n.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert len([line for line in code.splitlines() if line]) <= 17
    shutil.copy(made.path, tmp_path / "vim_s.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((180, 122)).save(tmp_path / "photo.jpg", quality=100)
    blocked = "import sys\nfor name in ('torch', 'ssmprune_cli', 'onnx'):\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    way = model.preprocessing
    assert isinstance(way, Preprocessing)
    prepared, _ = prepare_image(Image.open(tmp_path / "photo.jpg"), way)
    with torch.no_grad():
        logits = model(prepared[None])[0]
    said = done.stdout.split()
    assert int(said[1]) == int(logits.argmax())
    assert float(said[3]) == pytest.approx(float(logits.max()), abs=1e-4)
