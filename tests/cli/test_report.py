"""`ssmprune report` as a process, and the published schema: every report that we write is valid by it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from ssmprune_cli.report import report as facts

Run = Callable[..., subprocess.CompletedProcess[str]]
DEMO = Path(__file__).parents[2] / "recipes" / "demo"
CHECKPOINT = DEMO / "vim_digits.pth"  # large enough to get faster
VALIDATOR = Draft202012Validator(json.loads(Path(facts.__file__).with_name("report.schema.json").read_text()))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve labelled digits."""
    path = tmp_path_factory.mktemp("data") / "images.npz"
    few = np.load(DEMO / "test.npz")
    np.savez(path, images=few["images"][:12], labels=few["labels"][:12])
    return path


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compressed by a search, evaluated, with a sensitivity beside it: everything that a report can hold."""
    out = tmp_path_factory.mktemp("artefacts") / "searched"
    few = ("--importance", "clip", "--reduction", "drop", "--alignment", "none", "--evaluations", "4")
    target = ("--target-flops", "0.6", "--batch-size", "64", "--keep-image-size", "--samples", "2")
    done = ssmprune("compress", CHECKPOINT, *target, *few, "--calib", data, "--data", data, "--out", out)
    assert done.returncode == 0, done.stderr
    done = ssmprune("sensitivity", CHECKPOINT, "--calib", data, "--keep", "0.5", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def plain(ssmprune: Run, artefact: Path) -> Path:
    """Neither calibrated nor evaluated."""
    out = artefact.with_name("plain")
    done = ssmprune("compress", CHECKPOINT, "--keep", "0.7", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def validated(text: str) -> dict[str, Any]:
    """`text` as a report, which the published schema must admit."""
    report: dict[str, Any] = json.loads(text)
    assert [error.message for error in VALIDATOR.iter_errors(report)] == []
    return report


def test_the_published_schema_is_that_of_the_code() -> None:
    assert Path(facts.__file__).with_name("report.schema.json").read_text() == facts.schema(), (
        "write it again: python -c 'from ssmprune_cli.report.report import schema; print(schema(), end=\"\")' > "
        "ssmprune_cli/report/report.schema.json"
    )
    Draft202012Validator.check_schema(json.loads(facts.schema()))


def test_the_schema_refuses_what_is_no_report(plain: Path) -> None:
    report = validated((plain / "report.json").read_text())
    for wrong in ({**report, "extra": 1}, {**report, "format_version": 2}, {**report, "dense": None}):
        assert list(VALIDATOR.iter_errors(wrong))


def test_a_full_report_is_valid_and_holds_everything(ssmprune: Run, artefact: Path, data: Path) -> None:
    report = validated((artefact / "report.json").read_text())
    assert report["accuracy"]["count"] == sum(each["images"] for each in report["accuracy"]["classes"]) == 12
    right = sum(each["right_pruned"] for each in report["accuracy"]["classes"])
    assert report["accuracy"]["top1"] == pytest.approx(right / 12)
    assert report["speed"]["dense"]["median_ms"] > 0 and report["speed"]["pruned"]["peak_memory_bytes"] > 0
    assert sum(report["speed"]["dense"]["time_ms"].values()) == pytest.approx(report["speed"]["dense"]["median_ms"])
    low, high = report["speed"]["latency_ratio_interval"]
    assert 0 < low <= report["speed"]["latency_ratio"] <= high
    assert report["samples"][0]["label"] in range(10)
    assert [trial["chosen"] for trial in report["search"]].count(True) == 1
    assert [len(stage["kept"]) for stage in report["samples"][0]["stages"]] == [
        tokens
        for tokens, before in zip(report["pruning"]["tokens"], [225, *report["pruning"]["tokens"]], strict=False)
        if tokens < before
    ]
    done = ssmprune("report", artefact, "--json")
    assert done.returncode == 0 and done.stderr == ""
    (printed,) = json.loads(done.stdout)["reports"]
    assert printed.pop("name") == "searched"
    assert [each["keep"] for each in printed["sensitivity"]] == [0.5] * 11  # from sensitivity.json
    assert {**printed, "sensitivity": None} == report
    written = json.loads((artefact / "sensitivity.json").read_text())
    assert written["measurements"] == printed["sensitivity"]
    assert written["weights_sha256"] == printed["provenance"]["weights_sha256"]


def test_json_takes_no_other_form(ssmprune: Run, plain: Path, tmp_path: Path) -> None:
    for options in (("--format", "markdown"), ("--out", tmp_path / "report.html")):
        done = ssmprune("report", plain, "--json", *options)
        assert done.returncode == 2 and done.stdout == "" and "--json" in done.stderr
    assert not list(tmp_path.iterdir())


def test_html_is_the_default_and_markdown_goes_to_stdout(ssmprune: Run, artefact: Path) -> None:
    before = (artefact / "report.html").read_text()
    done = ssmprune("report", artefact)
    assert done.returncode == 0 and done.stdout == "" and done.stderr == f"Written to {artefact / 'report.html'}\n"
    page = (artefact / "report.html").read_text()
    assert "Sensitivity" in page and "Sensitivity" not in before  # which was measured since
    done = ssmprune("report", artefact, "--format", "markdown")
    report = json.loads((artefact / "report.json").read_text())
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("# searched: ")
    assert f"{100 * report['accuracy']['difference']:+.2f} points" in done.stdout
    assert done.stdout.count("\n| ") == 11  # titles, a rule and nine figures
    for place in (artefact / "report.json" / "x.html", artefact):  # a folder that is a file, a file that is a folder
        done = ssmprune("report", artefact, "--out", place)
        assert done.returncode == 1 and str(artefact) in done.stderr and "bug" not in done.stderr, done.stderr


def test_several_artefacts_are_compared(ssmprune: Run, artefact: Path, plain: Path, tmp_path: Path) -> None:
    done = ssmprune("report", artefact, plain)
    assert done.returncode == 2 and "--out" in done.stderr
    done = ssmprune("report", artefact, plain, "--out", tmp_path / "new" / "both.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "new" / "both.html").read_text()
    assert "2 compressed models" in page and "Accuracy against multiply-adds" in page and "Pareto front" in page
    assert "Accuracy was not measured for all of them" in page
    done = ssmprune("report", plain, artefact, "--format", "markdown")
    assert done.returncode == 0 and done.stdout.startswith("# 2 models") and done.stdout.count("\n# ") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is no folder with a report.json"),
        ("{", "is no report of this ssmprune: its text"),
        ('{"format_version": 0, "tokens": 1}', "it has the format 0, and this one reads 1"),
        ('{"format_version": 1, "family": 3}', "family: Input should be a valid string"),
        ('{"family": "vim"}', "image_size"),
    ],
)
def test_what_is_no_artefact_is_refused(ssmprune: Run, tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    done = ssmprune("report", tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("text", ["{", "3", '[{"point": 1}]'])
def test_a_damaged_sensitivity_is_named(ssmprune: Run, plain: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_bytes((plain / "report.json").read_bytes())
    (tmp_path / "sensitivity.json").write_text(text)
    done = ssmprune("report", tmp_path)
    assert done.returncode == 1 and "sensitivity.json: is no result of a sensitivity" in done.stderr


def test_a_sensitivity_of_other_weights_is_refused(ssmprune: Run, artefact: Path, plain: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((plain / "report.json").read_bytes())
    text = (artefact / "sensitivity.json").read_text()
    (tmp_path / "sensitivity.json").write_text(text)
    assert ssmprune("report", tmp_path).returncode == 0
    digest = json.loads(text)["weights_sha256"]
    (tmp_path / "sensitivity.json").write_text(text.replace(digest, digest[::-1]))
    done = ssmprune("report", tmp_path)
    assert done.returncode == 1 and "sensitivity.json: is of other weights than those" in done.stderr


def test_a_file_is_no_artefact_and_a_folder_of_artefacts_names_them(ssmprune: Run, plain: Path) -> None:
    done = ssmprune("report", plain / "report.json")
    assert done.returncode == 1 and "is no folder" in done.stderr
    done = ssmprune("report", plain.parent)
    assert done.returncode == 1 and str(plain) in done.stderr


def test_a_missing_sample_image_is_named(ssmprune: Run, artefact: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes((artefact / "report.json").read_bytes())
    done = ssmprune("report", tmp_path)
    assert done.returncode == 1 and "sample_1.png" in done.stderr


def test_reports_of_trained_models_are_valid(ssmprune: Run, plain: Path, data: Path, tmp_path: Path) -> None:
    common = ("--dataset", "npz", "--data", data, "--epochs", "1", "--set", "training.batch_size=4")
    small = ("--set", "image_size=[16,16]", "--set", "patch_size=4", "--set", "stride=4", "--set", "embed_dim=16")
    scratch = ("--from-scratch", *small, "--set", "depth=2", "--set", "num_classes=10")
    for name, options in (("pruned", (plain,)), ("dense", (CHECKPOINT,)), ("new", scratch)):
        out = tmp_path / name
        done = ssmprune("finetune", *options, *common, "--val-data", data, "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        (epoch,) = json.loads(done.stdout)["epochs"]  # one object, and nothing else
        report = validated((out / "last" / "report.json").read_text())
        assert len(report["finetuning"]["epochs"]) == 1 and (report["pruned"] is None) == (name != "pruned")
        assert report["finetuning"]["epochs"][0]["top1"] == epoch["top1"]
        page = (out / "last" / "report.html").read_text()
        assert "Fine-tuning" in page and f"{100 * epoch['top1']:.2f}" in page
        assert "Fine-tuned" in (out / "last" / "README.md").read_text()
