"""The demo's committed files: they are what the script makes, they are small, and test digits stay out of training.
What the demo runs is what the README shows, and its limit holds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from ssmprune_cli import checkpoint
from ssmprune_cli.data import Subset, calibration_images, open_dataset
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Size, smaller
from ssmprune_cli.pruning import repair
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.trials import Prepared, run

DEMO = Path(__file__).parent.parent / "recipes" / "demo"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    pytest.importorskip("sklearn", reason="the source digits come with scikit-learn")
    spec = importlib.util.spec_from_file_location("make_digits", DEMO / "make_digits.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up there
    spec.loader.exec_module(module)
    return module


def test_files_are_small_and_complete() -> None:
    sizes = [(DEMO / name).stat().st_size for name in ("test.npz", "calib.npz", "vim_digits.pth")]
    assert sum(sizes) <= 5_000_000
    with np.load(DEMO / "test.npz") as test, np.load(DEMO / "calib.npz") as calib:
        assert test["images"].shape == (2000, 64, 64) and test["images"].dtype == np.uint8
        assert set(test["labels"].tolist()) == set(range(10))
        assert calib["images"].shape == (1024, 64, 64) and calib.files == ["images"]  # no labels


@pytest.mark.slow
def test_checkpoint_is_right_on_97_percent_and_loses_at_most_a_point_with_fewer_pixels_and_blocks() -> None:
    """On every second test image, as `demo.sh` makes it smaller and refits its head."""
    model, images = checkpoint.load(DEMO / "vim_digits.pth"), open_dataset("npz", DEMO / "test.npz")
    some = Subset(images, range(0, len(images), 2))
    dense = evaluate(model, some).score.top1
    assert dense >= 0.97
    small, calib = smaller(model, Size(60, cut=2)), calibration_images(DEMO / "calib.npz", 1024, 0)
    answers = run(prepare(model), Prepared(model, calib, 64))
    repaired = repair(small, Prepared(small, calib, 64), runner=prepare(small).with_pruner, dense=answers)
    assert repaired.kind == "head"
    assert evaluate(small, some).score.top1 >= dense - 0.01 - 1e-9  # the limit that demo.sh states


@pytest.mark.skipif(sys.platform == "win32", reason="the demo is a script of bash")
def test_the_readme_shows_commands_of_the_demo(tmp_path: Path) -> None:
    """In their order; `ssmprune` is a program that does nothing here."""
    program = tmp_path / "ssmprune"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    done = subprocess.run(["bash", DEMO / "demo.sh"], env=environment, capture_output=True, text=True, check=True)
    run = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    readme = (DEMO.parents[1] / "README.md").read_text(encoding="utf-8")
    example = readme.split("## A worked example")[1].split("\n## ")[0]
    shown = [line for line in example.splitlines() if line.startswith("$ ")]
    assert len(shown) >= 2 and shown == [line for line in run if line in shown]
    assert "--max-drop 1" in shown[0]


@pytest.mark.parametrize("name", ["test", "calib"])
def test_script_reproduces_the_committed_images(script: ModuleType, name: str) -> None:
    made = script.make(name, script.load_pools(), script.COUNTS[name])
    with np.load(DEMO / f"{name}.npz") as committed:
        assert sorted(made) == sorted(committed.files)
        for key, values in made.items():
            np.testing.assert_array_equal(values, committed[key])


def test_pools_share_no_digit(script: ModuleType) -> None:
    pools = script.load_pools()
    train, test = pools["train"], pools["test"]
    assert sorted([*train.index, *test.index]) == list(range(1797))  # every source digit is in exactly one pool
    assert len(test.index) == 500
    pixels = {digit.tobytes() for digit in train.images}
    assert not any(digit.tobytes() in pixels for digit in test.images)  # no copy under another index either


@pytest.mark.parametrize(
    ("name", "used", "unused"), [("train", "train", "test"), ("test", "test", "train"), ("calib", "train", "test")]
)
def test_an_image_depends_on_its_own_pool_alone(script: ModuleType, name: str, used: str, unused: str) -> None:
    """Digit and clutter: blanking the other pool changes nothing, blanking the image's own pool does."""

    def blank(pool: str) -> dict[str, object]:
        pools = script.load_pools()
        digits = pools[pool]
        return {**pools, pool: script.Digits(digits.index, np.zeros_like(digits.images), digits.labels)}

    images = script.make(name, script.load_pools(), 20)["images"]
    np.testing.assert_array_equal(script.make(name, blank(unused), 20)["images"], images)
    changed = script.make(name, blank(used), 20)["images"] != images
    assert changed.any(axis=(1, 2)).all()


def test_digit_leaves_most_of_the_canvas_free(script: ModuleType) -> None:
    """Bright pixels (digits reach 0.8 or more, clutter 0.6 or less) lie within a box of 35 % of the canvas."""
    for image in script.make("test", script.load_pools(), 50)["images"]:
        rows, columns = np.nonzero(image > 0.7 * 255)
        assert 0 < np.ptp(rows) * np.ptp(columns) <= 0.35 * 64 * 64
