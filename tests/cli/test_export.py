"""`ssmprune export`, as a process."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Run = Callable[..., subprocess.CompletedProcess[str]]
CONTAINERS = Path(__file__).parents[1] / "golden" / "containers"
CHECKPOINT = CONTAINERS / "vim_like.pth"


def test_an_onnx_file_is_checked_with_given_images(ssmprune: Run, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 256, (80, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    arguments = ("--image-size", "64", "--check", tmp_path, "--out", tmp_path / "made")
    done = ssmprune("export", CHECKPOINT, *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    made = tmp_path / "made" / "model.onnx"
    assert result["path"] == str(made) and result["images"] == "2 given" and result["batch"] is None
    assert all(check["error"] <= 1e-4 and check["same"] == 1 for check in result["checks"])
    facts = onnxruntime.InferenceSession(made).get_modelmeta().custom_metadata_map
    assert facts["source"] == "vim_like.pth"
    assert facts["source_sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    again = ssmprune("export", CHECKPOINT, *arguments)
    assert again.returncode == 2 and "exists already" in again.stderr


def test_what_cannot_be_exported_is_said_at_once(ssmprune: Run, tmp_path: Path) -> None:
    done = ssmprune("export", CHECKPOINT, "--image-size", "64", "--out", tmp_path / "model.onnx", "--format", "pt2")
    assert done.returncode == 2 and "has the suffix .pt2" in done.stderr
    done = ssmprune("export", CHECKPOINT, "--image-size", "64", "--out", tmp_path, "--batch", "many")
    assert done.returncode == 2 and "or dynamic" in done.stderr
    segmenter = CONTAINERS / "vmamba_upernet_mmengine.pth"
    done = ssmprune("export", segmenter, "--out", tmp_path, "--check", CONTAINERS)
    assert done.returncode == 2 and "resize each image to a size of its own" in done.stderr
    assert list(tmp_path.iterdir()) == []
