"""A detector through the commands: a published container, and images with objects in COCO's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run
from tests.detection.conftest import container, read, write_coco

CLASSIFIER = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
NAMES = tuple(f"thing {number}" for number in range(80))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), images=4, names=NAMES)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    path = container(read("vmamba_maskrcnn_mini"), tmp_path_factory.mktemp("detector") / "epoch_12.pth")
    return str(path), "--image-size", "64"


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, detector: tuple[str, ...], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "small"
    done = ssmprune(
        "compress", *detector, "--keep", "0.7", "--reduction", "drop", "--calib", data / "val2017", "--batch-size", "1",
        "--eval-data", data, "--samples", "1", "--max-drop", "100", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "box AP on 4 images (%)" in done.stdout and "of the head (G)" in done.stdout
    assert "PASS" in done.stdout and "no linear classifier" in " ".join(done.stdout.split())
    return out


def test_a_report_has_both_models_boxes_and_masks(artefact: Path) -> None:
    report: dict[str, Any] = json.loads((artefact / "report.json").read_text(encoding="utf-8"))
    facts = report["detection"]
    assert any("backbone and the feature pyramid" in each for each in report["warnings"]), "what figures leave out"
    assert report["task"] == "detection" and facts["count"] == 4 and len(facts["classes"]) == 5
    assert facts["masks"]["ap"] is not None and facts["dense"]["boxes"]["ap"] is not None
    (sample,) = report["samples"]
    assert all((artefact / file).is_file() for file in sample["pictures"].values())
    assert set(sample["pictures"]) == {"dense", "pruned", "differs"}
    page = (artefact / "report.html").read_text(encoding="utf-8")
    assert "box AP on 4 images" in page and "objects of the dense model:" in page


def test_eval_saves_what_was_found(ssmprune: Run, artefact: Path, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = ssmprune(
        "eval", artefact, "--dataset", "coco", "--data", data, "--limit", "2", "--save-predictions", file, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert "backbone and the feature pyramid" in done.stderr
    assert json.loads(done.stdout)["boxes"].keys() >= {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"}
    rows = json.loads(file.read_text(encoding="utf-8"))
    assert rows and rows[0].keys() == {"image_id", "category_id", "bbox", "score", "segmentation"}


def test_profile_and_compare_say_what_they_leave_out(
    ssmprune: Run, detector: tuple[str, ...], artefact: Path, data: Path
) -> None:
    done = ssmprune("profile", artefact, "--rounds", "1", "--batch-size", "1", "--json")
    assert done.returncode == 0 and "backbone and the feature pyramid" in done.stderr, done.stderr
    asked = ("--methods", "clip/drop/none", "--keep", "0.7", "--rounds", "1", "--data", data, "--dataset", "coco")
    done = ssmprune("compare", *detector, *asked, "--json")
    assert done.returncode == 0 and "backbone and the feature pyramid" in done.stderr, done.stderr
    dense, pruned, *_ = json.loads(done.stdout)["rows"]
    assert dense["divergence"] == 0 < pruned["divergence"] and pruned["box_ap"] is not None


def test_what_does_not_fit_is_said(ssmprune: Run, detector: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    """One clear error that says what fits; and detectors are not trained."""
    done = ssmprune("eval", *detector, "--dataset", "imagefolder", "--data", data)
    assert done.returncode == 2 and "Fitting kinds are coco" in done.stderr
    done = ssmprune("eval", CLASSIFIER, "--dataset", "coco", "--data", data)
    assert done.returncode == 2 and "no dataset 'coco' for classification" in done.stderr
    done = ssmprune(
        "eval", CLASSIFIER, "--dataset", "imagefolder", "--data", data, "--save-predictions", tmp_path / "x.json"
    )
    assert done.returncode == 2 and "is for detection, and the model is for classification" in done.stderr
    done = ssmprune("finetune", *detector, "--data", data, "--out", tmp_path / "trained", "--epochs", "1")
    assert done.returncode == 2 and "a model for detection cannot be fine-tuned" in done.stderr
