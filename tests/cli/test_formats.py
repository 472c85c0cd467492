"""`--format`: a row for each model as CSV, Markdown and LaTeX; timm's columns; names that tell rows apart."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.cli import formats
from ssmprune_cli.errors import UsageError
from ssmprune_cli.files import distinct_names
from ssmprune_cli.report.report import AveragePrecision, ModelDetection, ModelSegmentation
from ssmprune_cli.tasks import TASKS

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"
TIMM = {"model", "top1", "top1_err", "top5", "top5_err", "param_count", "img_size", "crop_pct", "interpolation"}
TIMM_SPEED = {
    "infer_samples_per_sec",
    "infer_step_time",
    "infer_batch_size",
    "infer_img_size",
    "infer_gmacs",
    "param_count",
}
ROWS: list[formats.Row] = [
    {"model": "a|b_1 & 50 %", "top1": 81.60000000001, "tokens": (3, 2)},
    {"model": "two\nlines", "top1": None, "tokens": (), "more": 7},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one name, and labelled images."""
    path = tmp_path_factory.mktemp("data")
    for name in ("one", "two"):
        (path / name).mkdir()
        shutil.copy(CHECKPOINT, path / name / "vim_like.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), dtype=np.uint8)
    np.savez(path / "images.npz", images=pixels, labels=np.arange(10) % 10)
    return path


def printed(form: str, capsys: pytest.CaptureFixture[str]) -> str:
    formats.emit("", lambda: ROWS, {}, form)
    return capsys.readouterr().out


def test_csv_has_a_cell_for_each_column_of_any_row(capsys: pytest.CaptureFixture[str]) -> None:
    found = list(csv.reader(io.StringIO(printed("csv", capsys))))
    assert found == [
        ["model", "top1", "tokens", "more"],
        ["a|b_1 & 50 %", "81.6", "3 2", ""],
        ["two\nlines", "", "", "7"],
    ]


def test_markdown_and_latex_escape_what_they_take_for_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed("markdown", capsys).splitlines()
    assert lines[1:] == ["| --- | ---: | --- | ---: |", r"| a\|b_1 & 50 % | 81.6 | 3 2 |  |", "| two lines |  |  | 7 |"]
    lines = printed("latex", capsys).splitlines()
    assert lines[1] == r"\begin{tabular}{lrlr}" and lines[-1] == r"\end{tabular}"
    assert r"a|b\_1 \& 50 \% & 81.6 & 3 2 &  \\" in lines


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (2) (2)"]), max_size=8))
def test_no_two_names_are_alike_and_the_first_keeps_its_own(names: list[str]) -> None:
    found = formats.unique(names)
    assert len(set(found)) == len(names)
    assert all(own.startswith(name) for own, name in zip(found, names, strict=True))
    assert found[:1] == names[:1]


def test_paths_are_told_apart_by_their_shortest_ends(tmp_path: Path) -> None:
    assert distinct_names([tmp_path / "a/x.pth", tmp_path / "b/x.pth"]) == ["a/x.pth", "b/x.pth"]
    assert distinct_names([tmp_path / "a/x.pth", tmp_path / "a/y.pth"]) == ["x.pth", "y.pth"]
    assert distinct_names([tmp_path / "a/x.pth"] * 2) == ["x.pth", "x.pth"]
    assert distinct_names([]) == []


def test_two_forms_are_refused_before_any_work(ssmprune: Run) -> None:
    with pytest.raises(UsageError):
        formats.chosen("csv", as_json=True)
    done = ssmprune("profile", "no such file", "--json", "--format", "csv")
    assert done.returncode == 2 and "--json and --format csv ask for two forms" in done.stderr


def test_profile_has_the_columns_of_timm(ssmprune: Run, folder: Path) -> None:
    models = (folder / "one/vim_like.pth", "--compare", folder / "two/vim_like.pth")
    done = ssmprune("profile", *models, "--rounds", "1", "--batch-size", "2", "--format", "csv")
    assert done.returncode == 0, done.stderr
    first, second = csv.DictReader(io.StringIO(done.stdout))
    assert first.keys() >= TIMM_SPEED
    assert (first["model"], second["model"]) == ("one/vim_like.pth", "two/vim_like.pth")
    assert float(first["infer_gmacs"]) == pytest.approx(13519584 / 1e9, rel=1e-5)
    assert float(first["param_count"]) == pytest.approx(0.115306)
    per_image = float(first["infer_step_time"]) / int(first["infer_batch_size"])
    assert float(first["infer_samples_per_sec"]) == pytest.approx(1e3 / per_image, rel=1e-4)


def test_eval_says_the_same_in_every_form(ssmprune: Run, folder: Path) -> None:
    models = (folder / "one/vim_like.pth", "--compare", folder / "two/vim_like.pth")
    common = ("eval", *models, "--dataset", "npz", "--data", folder / "images.npz")
    facts = json.loads(ssmprune(*common, "--format", "json").stdout)
    done = ssmprune(*common, "--format", "csv")
    first, second = csv.DictReader(io.StringIO(done.stdout))
    assert first.keys() >= TIMM and len({first["model"], second["model"]}) == 2
    assert float(first["top1"]) == pytest.approx(100 * facts["top1"])
    assert float(first["top1"]) + float(first["top1_err"]) == pytest.approx(100)
    assert float(first["top1_low"]) == pytest.approx(100 * facts["interval"][0], rel=1e-5)
    assert (first["top1_change"], second["top1_change"]) == ("0", "")
    assert (first["img_size"], first["crop_pct"], first["interpolation"]) == ("64", "0.875", "bicubic")
    assert ssmprune(*common, "--format", "latex").stdout.count(r" \\") == 3
    assert "one/vim_like.pth" in re.sub(r"\s", "", ssmprune(*common).stdout)


def test_dense_models_have_the_columns_of_their_task() -> None:
    segmented = ModelSegmentation(miou=0.4, interval=None, aacc=0.8, macc=0.5, classes=())
    assert TASKS.get("segmentation").columns(segmented) == {
        "miou": 0.4,
        "miou_low": None,
        "miou_high": None,
        "aacc": 0.8,
        "macc": 0.5,
    }
    boxes = AveragePrecision(ap=0.4, ap50=0.6, ap75=0.5, ap_small=None, ap_medium=0.4, ap_large=0.5)
    masks = boxes.model_copy(update={"ap": 0.3})
    found = TASKS.get("detection").columns(ModelDetection(boxes=boxes, masks=masks, interval=(0.3, 0.5), classes=()))
    assert (found["box_ap"], found["box_ap_low"], found["mask_ap"], found["mask_ap75"]) == (0.4, 0.3, 0.3, 0.5)
    assert "mask_ap" not in TASKS.get("detection").columns(
        ModelDetection(boxes=boxes, masks=None, interval=None, classes=())
    )


def test_compare_has_a_name_for_each_row(ssmprune: Run, folder: Path) -> None:
    options = ("--keep", "0.8,0.6", "--methods", "clip/drop/none,clip/drop/none", "--rounds", "1")
    models = (folder / "one/vim_like.pth", "--dense", folder / "two/vim_like.pth")
    done = ssmprune("compare", *models, "--data", folder / "images.npz", *options, "--format", "csv")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    names = [row["model"] for row in rows]
    assert len(set(names)) == len(names)
    assert {"one/vim_like.pth", "two/vim_like.pth", "clip/drop/none at keep 0.8", "clip/drop/none at keep 0.6"} <= set(
        names
    )
    assert {"infer_gmacs", "infer_samples_per_sec", "img_size", "top1"} <= rows[0].keys()
    assert [float(row["gmacs_share"]) for row in rows if "(2)" not in row["model"]][:2] == [1, 1]
