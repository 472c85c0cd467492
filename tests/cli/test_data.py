"""Images as users have them, through the program: what is said of their labels, names of any bytes, what is no file."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli import checkpoint
from ssmprune_cli.workflows.finetune import build

Run = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=12"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense artefact folder of a small model with 12 classes."""
    out = tmp_path_factory.mktemp("model") / "dense"
    checkpoint.save(out, build("vim", SETTINGS, name="vim_midclstok_div2", seed=0).eval())
    return out


def tree(root: Path, images: int = 1) -> Path:
    """Class folders 0 to 11; the last one holds what nobody reads."""
    noise = np.random.default_rng(0)
    for label in range(12):
        (root / str(label)).mkdir(parents=True)
        for number in range(images if label < 11 else 0):
            pixels = noise.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{number}.png")
    (root / "11" / "1.heic").write_bytes(b"heic")
    return root


def test_eval_says_which_order_of_the_classes_it_took(ssmprune: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("eval", model, "--dataset", "imagefolder", "--data", tree(tmp_path / "images"))
    done = ssmprune(*arguments, "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    notes = json.loads(done.stdout)["notes"]
    assert [f"warning: {note}" for note in notes] == done.stderr.splitlines()
    order, empty, left_out = notes
    assert "numbered by name: 0, 1, 10, 11, 2, and 7 more; by number it would be 0, 1, 2, 3, 4" in order
    assert "no images of the class 11 (only 1 .heic)" in empty and "left out: 1 .heic" in left_out


def test_compress_keeps_the_notes_in_the_report(ssmprune: Run, model: Path, tmp_path: Path) -> None:
    images, out = tree(tmp_path / "images"), tmp_path / "out"
    done = ssmprune("compress", model, "--keep", "0.6", "--data", images, "--calib", images, "--out", out)
    assert done.returncode == 0, done.stderr
    warnings = json.loads((out / "report.json").read_text())["warnings"]
    assert sum("by number it would be" in warning for warning in warnings) == 1
    assert done.stderr.count("left out: 1 .heic") == 1, "the same images are not named twice"


def test_names_that_are_no_utf8_come_through(ssmprune: Run, model: Path, tmp_path: Path) -> None:
    """From the model and `--calib` to `--out`, the report and stdout."""

    def named(name: bytes) -> Path:
        return Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))

    calib, out = named(b"calib\xe9"), named(b"sortie\xff")
    calib.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(calib / os.fsdecode(b"\xe9%d.png" % number))
    done = ssmprune("compress", model, "--keep", "0.6", "--calib", calib, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert json.loads((out / "report.json").read_text(encoding="utf-8"))["samples"] == report["samples"]
    assert {each["name"] for each in report["samples"]} == {f"\\udce9{number}.png" for number in range(4)}
    for arguments in (
        ("report", out),
        ("sensitivity", model, "--calib", calib, "--keep", "0.5", "--out", named(b"mesures\xfe")),
    ):
        done = ssmprune(*arguments)
        assert done.returncode == 0, done.stderr
    done = ssmprune("eval", out, "--dataset", "imagefolder", "--data", named(b"nowhere\xff"))
    assert done.returncode == 1 and "nowhere\\udcff: does not exist" in done.stderr


def test_a_pipe_does_not_keep_the_program_waiting(ssmprune: Run, model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    done = ssmprune("compress", model, "--keep", "0.6", "--calib", tmp_path, "--out", tmp_path / "out")
    assert done.returncode == 1 and "a.jpg: is a pipe, not a file" in done.stderr
