"""A segmenter through every command: a published container, a folder of images and masks, images of two sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli.preprocessing import Reading
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.source import Source
from tests.cli.conftest import Run

CONTAINERS = Path(__file__).parents[1] / "golden" / "containers"
SEGMENTER = (str(CONTAINERS / "vmamba_upernet_mmengine.pth"), "--image-size", "32")
CLASSIFIER = str(CONTAINERS / "vim_like.pth")
NAMES = ("wall", "sky", "tree", "road", "car", "door", "bed", "void")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of 44 x 32 and 32 x 40 pixels, seven classes and void."""
    root = tmp_path_factory.mktemp("scenes")
    draw = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for number in range(8):
        size = (44, 32) if number % 2 else (32, 40)
        coarse = Image.fromarray(draw.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(root / "images" / f"{number}.png")
        classes = Image.fromarray(draw.integers(0, 8, (4, 4), dtype=np.uint8))
        classes.resize(size, Image.Resampling.NEAREST).save(root / "masks" / f"{number}.png")
    (root / "classes.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "small"
    done = ssmprune(
        "compress", *SEGMENTER, "--keep", "0.5", "--points", "3", "--reduction", "drop", "--calib", data / "images",
        "--eval-data", data, "--samples", "2", "--max-drop", "100", "--min-miou", "0", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "classes.txt: pixels of void (7) are not judged." in done.stderr
    assert "mIoU on 8 images (%)" in done.stdout and "of the head (G)" in done.stdout
    assert "PASS: all 2 limits are kept." in done.stdout
    return out


def values(done: Any) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_report_has_both_models_masks_and_figures(artefact: Path) -> None:
    report = json.loads((artefact / "report.json").read_text(encoding="utf-8"))
    facts = report["segmentation"]
    assert (report["task"], report["accuracy"], facts["count"]) == ("segmentation", None, 8)
    assert [each["name"] for each in facts["classes"]] == list(NAMES[:7])
    assert facts["difference"] == pytest.approx(facts["miou"] - facts["dense"]["miou"])
    low, high = facts["difference_interval"]
    assert low <= facts["difference"] <= high
    dense, pruned = report["dense"], report["pruned"]
    assert 0 < dense["multiply_adds_head"] == pruned["multiply_adds_head"] < pruned["multiply_adds_all_directions"]
    assert len(report["samples"]) == 2 and report["speed"]["batch_size"] == 1
    page = (artefact / "report.html").read_text(encoding="utf-8")
    for number, sample in enumerate(report["samples"], start=1):
        assert sample["pictures"] == {each: f"sample_{number}_{each}.png" for each in ("dense", "pruned", "differs")}
        assert sample["predicted_dense"] is None and sample["words"].endswith("of the pixels change their class")
        assert sample["words"] in page and sample["size"] in ([32, 44], [40, 32])
        for file in sample["pictures"].values():
            with Image.open(artefact / file) as picture:
                assert [picture.height, picture.width] == sample["size"]
    assert "IoU, dense" in page and "of the backbone, all directions" in page
    assert "mIoU on 8 images" in (artefact / "README.md").read_text(encoding="utf-8")


def test_eval_measures_what_the_report_says(ssmprune: Run, artefact: Path, data: Path) -> None:
    report = json.loads((artefact / "report.json").read_text(encoding="utf-8"))["segmentation"]
    asked = ("eval", artefact, "--compare", SEGMENTER[0], *SEGMENTER[1:], "--dataset", "segfolder", "--data-dir", data)
    found = values(ssmprune(*asked, "--json"))
    for name in ("miou", "aacc", "macc", "difference", "interval", "difference_interval", "classes", "dense"):
        own = (
            {key: value for key, value in found[name].items() if key in report[name]}
            if name == "dense"
            else found[name]
        )
        assert own == report[name]
    table = ssmprune(*asked, "--max-drop", "-50")
    assert table.returncode == 3 and "--max-drop allows -50" in table.stderr
    for text in ("mIoU (%)", "aAcc (%)", "mAcc (%)", "│ sky ", "paired bootstrap over 8 images"):
        assert text in table.stdout
    slid = values(ssmprune("eval", *SEGMENTER, "--dataset", "segfolder", "--data", data, "--slide", "24,16", "--json"))
    assert slid["miou"] != report["dense"]["miou"]


def test_compress_judges_through_windows(data: Path, tmp_path: Path) -> None:
    """In this process. As `eval` does with the same windows."""
    source = Source(Path(SEGMENTER[0]), Reading(image_size=32))
    asked = CompressRequest(
        source, keep="0.5", reduction="drop", data=data, slide=(24, 16), samples=0, out=tmp_path / "slid"
    )
    report = compress_checkpoint(asked).report
    task = TASKS.get("segmentation").sliding((24, 24), (16, 16))
    expected = evaluate(source.load(), task.open(data), task=task).score
    assert report.segmentation is not None and report.segmentation.dense == expected
    assert report.provenance["evaluation_slide"] == "24,16"


def test_compare_and_profile(ssmprune: Run, data: Path) -> None:
    asked = ("--data", data, "--keep", "0.5", "--methods", "clip/drop/none,clip/local-merge/mass")
    rows = values(ssmprune("compare", *SEGMENTER, *asked, "--calib", data / "images", "--rounds", "1", "--json"))[
        "rows"
    ]
    assert [row["divergence"] == 0 for row in rows[:3]] == [True, False, False]
    assert all(0 <= row["miou_interval"][0] <= row["miou"] <= row["miou_interval"][1] <= 1 for row in rows)
    assert "top1" not in rows[0] and rows[1]["share"] < 1
    (model,) = values(ssmprune("profile", *SEGMENTER, "--rounds", "1", "--json"))["models"]
    assert model["batch_size"] == 1 and 0 < model["multiply_adds_head"] < model["multiply_adds_all_directions"]


def test_sensitivity_on_images_of_two_sizes(ssmprune: Run, data: Path) -> None:
    asked = ("--calib", data / "images", "--keep", "0.5", "--json")
    found = values(ssmprune("sensitivity", *SEGMENTER, *asked))["measurements"]
    assert [each["point"] for each in found] == [3] and found[0]["divergence"] > 0 and found[0]["token_error"] > 0


@pytest.mark.usefixtures("without_noise")
def test_a_search_on_images_of_two_sizes(data: Path, tmp_path: Path) -> None:
    """In this process: on the clock of a real machine so small a model need not get faster."""
    asked = CompressRequest(
        Source(Path(SEGMENTER[0]), Reading(image_size=32)),
        target_flops=0.99,
        calib=data / "images",
        evaluations=8,
        importance="clip",
        reduction="drop",
        alignment="none",
        keep_image_size=True,
        samples=0,
        out=tmp_path / "found",
    )
    target = compress_checkpoint(asked).report.target
    assert target is not None and target.met and target.kind == "multiply_adds"


def test_visualize_draws_masks_and_kept_patches(ssmprune: Run, artefact: Path, data: Path, tmp_path: Path) -> None:
    found = values(ssmprune("visualize", artefact, data / "images", "--count", "2", "--out", tmp_path / "p", "--json"))
    assert len(found["images"]) == 2
    for entry in found["images"]:
        with Image.open(data / "images" / entry["name"]) as image:
            size = image.size
        for title in ("dense", "pruned", "differs"):
            with Image.open(entry[title]) as picture:
                assert picture.size == size
        (stage,) = entry["stages"]
        assert Path(stage["kept"]).is_file() and Path(stage["score"]).is_file()
        assert entry["answers"].endswith("of the pixels change their class")
    assert Path(found["overview"]).is_file()


def test_finetune_trains_on_masks(ssmprune: Run, artefact: Path, data: Path, tmp_path: Path) -> None:
    """Overfitted to eight images: the loss falls, and what is judged is mIoU."""
    out = tmp_path / "tuned"
    done = ssmprune(
        "finetune", artefact, "--data", data, "--val-data", data, "--epochs", "4", "--batch-size", "3", "--lr", "0.005",
        "--warmup", "0", "--flip", "--set", "training.crop_scale=0.5", "--set", "training.min_lr=0.001", "--out", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch 4 of 4: loss" in done.stderr and "mIoU" in done.stderr
    epochs = json.loads((out / "last" / "report.json").read_text(encoding="utf-8"))["finetuning"]["epochs"]
    assert epochs[-1]["loss"] < epochs[0]["loss"] and epochs[-1]["top1"] is None
    best = max(each["miou"] for each in epochs)
    found = values(ssmprune("eval", out / "best", "--dataset", "segfolder", "--data", data, "--json"))
    assert found["miou"] == pytest.approx(best, abs=1e-9)
    page = (out / "last" / "report.html").read_text(encoding="utf-8")
    assert '<th scope="col">mIoU</th>' in page


WRONG = {
    "a classifier with masks": (
        ("eval", CLASSIFIER, "--dataset", "segfolder"),
        "there is no dataset 'segfolder' for classification, which is what the model is for",
    ),
    "a segmenter with classes": (
        ("eval", *SEGMENTER, "--dataset", "imagefolder"),
        "there is no dataset 'imagefolder' for segmentation",
    ),
    "a limit of classifiers": (
        ("eval", *SEGMENTER, "--dataset", "segfolder", "--min-accuracy", "3"),
        "--min-accuracy: is no limit for segmentation",
    ),
    "windows of a classifier": (
        ("eval", CLASSIFIER, "--dataset", "imagefolder", "--slide", "8,8"),
        "--slide: is for segmentation",
    ),
    "windows of a compressed classifier": (
        ("compress", CLASSIFIER, "--keep", "0.7", "--out", "{out}", "--dataset", "imagefolder", "--slide", "8,8"),
        "--slide: is for segmentation",
    ),
    "mixed images": (
        ("finetune", *SEGMENTER, "--batch-size", "2", "--set", "training.mixup=0.4", "--out", "{out}"),
        "training.mixup is for images of one class",
    ),
    "images without masks": (
        ("compress", *SEGMENTER, "--keep", "0.7", "--out", "{out}", "--data", "{images}"),
        "has no images/ beside masks/, labels/ or annotations/",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_one_error(case: str, ssmprune: Run, data: Path, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    places = {"{out}": str(tmp_path / "out"), "{images}": str(CONTAINERS)}
    given = [places.get(each, each) for each in arguments]
    done = ssmprune(*given, *(() if "--data" in given else ("--data", data)))
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
