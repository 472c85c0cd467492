"""Smaller images on the command line: compress --resize, alone and with tokens dropped, and what comes of it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.models import resize
from ssmprune_cli.preprocessing import Reading
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.workflows.identity import weights_sha256

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
MADE_OF_IT = {"config.json", "model.safetensors", "dense.safetensors", "recipe.yaml"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "labelled.npz"
    pixels = np.random.default_rng(1).integers(0, 256, (20, 80, 70, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(20) % 10)
    return path


@pytest.fixture(scope="module")
def resized(ssmprune: Run, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "model"
    options = ("--data", images, "--dataset", "npz", "--max-flops", "0.6", "--samples", "1")
    done = ssmprune("compress", CHECKPOINT, "--resize", "48", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Image 64 -> 48 pixels." in done.stdout and "resized" in done.stdout and "Keep ratio" not in done.stdout
    assert "calibrated" not in done.stderr
    return out


def test_smaller_images_alone_need_no_pruner(resized: Path) -> None:
    assert {each.name for each in resized.iterdir()} == MADE_OF_IT | {
        *("report.json", "report.html", "README.md", "sample_1.png")
    }
    model, dense = checkpoint.load(resized), checkpoint.load(CHECKPOINT)
    assert model.pruner is None and model.image_size == (48, 48)
    report = json.loads((resized / "report.json").read_text())
    assert (report["image_size"], report["resized_from"], report["pruning"]) == ([48, 48], [64, 64], None)
    assert report["dense"]["tokens_per_block"] == [65] * 4 and report["pruned"]["tokens_per_block"] == [37] * 4
    assert report["accuracy"]["count"] == 20 and report["limits"][0]["holds"] and report["calibration"] is None
    assert report["provenance"]["weights_sha256"] == weights_sha256(dense)
    assert report["speed"]["latency_ratio"] > 0 and report["samples"][0]["stages"] == []
    for name in ("README.md", "report.html"):
        text = (resized / name).read_text()
        assert "image 64 -> 48 pixels" in text.replace("&gt;", ">") and "no tokens are dropped" in text
        assert "pruned" not in (text.partition("</style>")[2] or text) and "number of parameters" not in text
    assert "image_size: 48" in (resized / "recipe.yaml").read_text()


def test_both_models_are_judged_on_the_same_images_each_in_its_own_way(
    ssmprune: Run, resized: Path, images: Path
) -> None:
    done = ssmprune(
        *("eval", resized, "--compare", CHECKPOINT, "--dataset", "npz", "--data", images, "--json"),
        *("--max-drop", "100", "--max-flops", "0.6"),
    )
    assert done.returncode == 0, done.stderr
    result, report = json.loads(done.stdout), json.loads((resized / "report.json").read_text())
    for part in ("top1", "difference"):
        assert result[part] == pytest.approx(report["accuracy"][part])
    assert result["dense"]["top1"] == pytest.approx(report["accuracy"]["dense"]["top1"])
    done = ssmprune("profile", resized, "--compare", CHECKPOINT, "--rounds", "1", "--batch-size", "1")
    assert done.returncode == 0 and "48x48 pixels and 64x64 pixels" in done.stdout


def test_an_artefact_is_compressed_again_from_the_dense_model(
    ssmprune: Run, resized: Path, images: Path, tmp_path: Path
) -> None:
    again, anew = tmp_path / "again", tmp_path / "anew"
    options = ("--resize", "56", "--keep", "0.6", "--reduction", "local-merge", "--calib", images, "--samples", "1")
    done = ssmprune("compress", resized, *options, "--out", again)
    assert done.returncode == 0, done.stderr
    assert "its dense weights are compressed anew" in done.stderr
    assert "Image 64 -> 56 pixels." in done.stdout and "Keep ratio 0.6 at each point" in done.stdout
    done = ssmprune("compress", CHECKPOINT, "--recipe", again / "recipe.yaml", "--calib", images, "--out", anew)
    assert done.returncode == 0, done.stderr
    for name in ("config.json", "model.safetensors", "dense.safetensors"):
        assert (again / name).read_bytes() == (anew / name).read_bytes(), name
    report = json.loads((again / "report.json").read_text())
    assert report["pruning"]["tokens"] == [30, 18, 11] and report["pruning"]["alignment"] == "mass"
    assert report["resized_from"] == [64, 64] and len(report["samples"][0]["stages"]) == 3
    model, dense = checkpoint.load(again), checkpoint.load(CHECKPOINT)
    assert isinstance(model.pruner, TokenPruner)
    expected = resize(dense, 56)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.state_dict().items())
    assert weights_sha256(checkpoint.load_as(again, Reading(), dense=True)) == weights_sha256(dense)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--resize", "50"], ["patches do not fill images of 50 pixels", "Possible sides nearby: 48 or 56."]),
        (["--resize", "64"], ["so 64 is no smaller side", "Possible sides: 56, 48, 40, 32."]),
    ],
)
def test_a_side_that_does_not_fit_is_wrong_usage(
    ssmprune: Run, tmp_path: Path, options: list[str], messages: list[str]
) -> None:
    done = ssmprune("compress", CHECKPOINT, *options, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert all(message in done.stderr for message in messages), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_visualize_says_why_there_is_nothing_to_draw(
    ssmprune: Run, resized: Path, images: Path, tmp_path: Path
) -> None:
    done = ssmprune("visualize", resized, images, "--out", tmp_path / "out")
    assert done.returncode == 2 and "a `--keep` below 1 beside `--resize`" in done.stderr, done.stderr


def test_a_fine_tuned_one_stays_what_it_is_and_has_no_dense_model_any_more(
    ssmprune: Run, resized: Path, images: Path, tmp_path: Path
) -> None:
    options = ("--dataset", "npz", "--data", images, "--epochs", "1", "--batch-size", "8")
    done = ssmprune("finetune", resized, *options, "--out", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    last = tmp_path / "tuned" / "last"
    report = json.loads((last / "report.json").read_text())
    assert (
        report["resized_from"] == [64, 64] and report["accuracy"] is None and len(report["finetuning"]["epochs"]) == 1
    )
    assert checkpoint.load(last).image_size == (48, 48)
    done = ssmprune("compress", last, "--keep", "0.6", "--out", tmp_path / "out")
    assert done.returncode == 1 and "there is no dense.safetensors" in done.stderr
    assert "Give the checkpoint that it was made of" in done.stderr
