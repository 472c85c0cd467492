"""Fewer blocks on the command line: compress --cut-blocks, and what every command makes of the result."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssmprune_cli import checkpoint
from ssmprune_cli.preprocessing import NOTHING_SAID
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.workflows.identity import weights_sha256

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
FILES = ("config.json", "model.safetensors", "dense.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "labelled.npz"
    pixels = np.random.default_rng(1).integers(0, 256, (70, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(70) % 10)
    return path


@pytest.fixture(scope="module")
def cut(ssmprune: Run, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    options = ("--calib", images, "--data", images, "--dataset", "npz", "--limit", "8", "--samples", "0")
    done = ssmprune("compress", CHECKPOINT, "--cut-blocks", "1", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Blocks 4 -> 3." in done.stdout and "left out" in done.stdout and "cut short" in done.stdout
    assert ("should be refitted, and was not" in done.stderr) == ("Repair: none" in done.stdout)
    return out


def test_report_card_and_recipe_say_which_blocks_are_left_out(cut: Path) -> None:
    report = json.loads((cut / "report.json").read_text())
    assert report["blocks_left_out"] == [4] and report["pruning"] is None and report["resized_from"] is None
    assert report["dense"]["tokens_per_block"] == [65] * 4 and report["pruned"]["tokens_per_block"] == [65] * 3
    assert report["repair"] is not None and report["parameters"] < sum(
        each.numel() for each in checkpoint.load(CHECKPOINT).parameters()
    )
    for name in ("README.md", "report.html"):
        text = (cut / name).read_text().replace("&gt;", ">")
        assert "blocks 4 -> 3" in text and "Fewer blocks alone make it cheaper" in text
        assert "Blocks of the dense model that are left out: 4." in text
    assert "cut_blocks: 1" in (cut / "recipe.yaml").read_text()


def test_it_loads_again_and_knows_the_dense_model(cut: Path) -> None:
    model, dense = checkpoint.load(cut), checkpoint.load(CHECKPOINT)
    assert len(model.mixers) == 3 and model.pruner is None
    assert weights_sha256(checkpoint.load_as(cut, NOTHING_SAID, dense=True)) == weights_sha256(dense)


def test_eval_and_inspect_take_it(ssmprune: Run, cut: Path, images: Path) -> None:
    done = ssmprune(
        "eval", cut, "--compare", CHECKPOINT, "--dataset", "npz", "--data", images, "--limit", "8", "--json"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((cut / "report.json").read_text())
    assert json.loads(done.stdout)["top1"] == pytest.approx(report["accuracy"]["top1"])
    done = ssmprune("inspect", cut, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["blocks"] == 3, done.stderr


def test_tokens_are_dropped_in_the_blocks_that_are_left_and_the_recipe_does_it_again(
    ssmprune: Run, cut: Path, images: Path, tmp_path: Path
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    options = ("--keep", "0.6", "--points", "1", "--reduction", "drop", "--calib", images, "--samples", "0")
    done = ssmprune("compress", cut, "--cut-blocks", "2", *options, "--out", first)
    assert done.returncode == 0, done.stderr
    done = ssmprune("compress", CHECKPOINT, "--recipe", first / "recipe.yaml", "--calib", images, "--out", again)
    assert done.returncode == 0, done.stderr
    for name in FILES:
        assert (first / name).read_bytes() == (again / name).read_bytes(), name
    model = checkpoint.load(first)
    assert len(model.mixers) == 2 and isinstance(model.pruner, TokenPruner)
    report = json.loads((first / "report.json").read_text())
    assert report["blocks_left_out"] == [3, 4] and report["pruning"]["points"] == [1]
