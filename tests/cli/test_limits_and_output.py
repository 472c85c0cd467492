"""Limits and their exit code; --quiet; one JSON object; tables of 80 columns; colour on terminals only."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.conftest import Run, Start

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a long name, and labelled images of noise."""
    path = tmp_path_factory.mktemp("data")
    shutil.copy(GOLDEN, path / "vim_s_midclstok_ft_81p6acc_like.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), dtype=np.uint8)
    np.savez(path / "images.npz", images=pixels, labels=np.arange(20) % 10)
    return path


@pytest.fixture(scope="module")
def artefact(ssmprune: Run, folder: Path) -> Path:
    out = folder / "vim_s_midclstok_ft_81p6acc_like_keep_0.6"
    done = ssmprune("compress", checkpoint(folder), "--keep", "0.6", "--calib", folder / "images.npz", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def checkpoint(folder: Path) -> Path:
    return folder / "vim_s_midclstok_ft_81p6acc_like.pth"


# --- limits


def test_compress_prints_and_writes_before_it_fails(ssmprune: Run, folder: Path) -> None:
    out = folder / "limited"
    common = ("compress", checkpoint(folder), "--keep", "0.6", "--data", folder / "images.npz", "--out", out)
    bad = ("--max-drop", "-99", "--min-accuracy", "99.5", "--max-flops", "0.1", "--max-latency-ratio", "0.001")
    done = ssmprune(*common, *bad, "--json")
    assert done.returncode == 3
    for option in ("--max-drop", "--min-accuracy", "--max-flops", "--max-latency-ratio"):
        assert done.stderr.count(option) == 1
    printed = json.loads(done.stdout)
    assert [(each["name"], each["holds"]) for each in printed["limits"]] == [
        ("max_drop", False),
        ("min_accuracy", False),
        ("max_flops", False),
        ("max_latency_ratio", False),
    ]
    assert printed["limits"][2]["value"] == pytest.approx(8391456 / 13519584)
    assert (out / "report.html").is_file()
    good = ("--max-drop", "100", "--min-accuracy", "0", "--max-flops", "0.63", "--max-latency-ratio", "1000")
    done = ssmprune(*common, *good, "--overwrite")
    assert done.returncode == 0, done.stderr


def test_eval_holds_a_model_to_limits(ssmprune: Run, artefact: Path, folder: Path) -> None:
    common = ("eval", artefact, "--dataset", "npz", "--data", folder / "images.npz", "--json")
    done = ssmprune(*common, "--min-accuracy", "99.9")
    assert done.returncode == 3 and "--min-accuracy asks for 99.9" in done.stderr
    assert json.loads(done.stdout)["limits"][0]["holds"] is False
    compared = (*common, "--compare", checkpoint(folder))
    done = ssmprune(*compared, "--max-drop", "-99", "--max-flops", "0.6", "--max-latency-ratio", "0.0001")
    assert done.returncode == 3 and len(done.stderr.splitlines()) == 3
    done = ssmprune(*compared, "--max-drop", "100", "--max-flops", "0.63", "--max-latency-ratio", "1000")
    assert done.returncode == 0 and all(each["holds"] for each in json.loads(done.stdout)["limits"])


@pytest.mark.parametrize("option", ["--max-drop", "--max-flops", "--max-latency-ratio"])
def test_a_limit_without_what_it_needs_is_wrong_usage(ssmprune: Run, folder: Path, option: str) -> None:
    done = ssmprune("eval", checkpoint(folder), "--dataset", "npz", "--data", folder / "images.npz", option, "1")
    assert done.returncode == 2 and f"{option} needs --compare" in done.stderr and done.stdout == ""
    if option == "--max-latency-ratio":
        done = ssmprune("compress", checkpoint(folder), "--keep", "0.6", "--dry-run", option, "1")
        assert done.returncode == 2 and "dry run" in done.stderr


def test_a_dry_run_can_be_held_to_multiply_adds(ssmprune: Run, folder: Path) -> None:
    done = ssmprune("compress", checkpoint(folder), "--keep", "0.6", "--dry-run", "--max-flops", "0.5")
    assert done.returncode == 3 and "--max-flops allows 0.5" in done.stderr


# --- quiet


def test_quiet_leaves_warnings_and_errors(ssmprune: Run, folder: Path) -> None:
    common = ("compress", checkpoint(folder), "--keep", "0.6", "--out", folder / "quiet")
    loud = ssmprune(*common)
    assert "Written to" in loud.stderr and "Nothing was calibrated" in loud.stderr
    done = ssmprune(*common, "--overwrite", "--quiet")
    assert done.returncode == 0 and "Written to" not in done.stderr and "Nothing was calibrated" in done.stderr
    assert "multiply-adds" in done.stdout
    done = ssmprune(*common, "--quiet")
    assert done.returncode == 1 and "not empty" in done.stderr


# --- JSON and tables


def commands(folder: Path, artefact: Path) -> dict[str, tuple[Any, ...]]:
    images, ckpt = folder / "images.npz", checkpoint(folder)
    labelled = ("--dataset", "npz", "--data", images)
    once = ("--rounds", "1")
    few = ("--importance", "clip", "--reduction", "drop", "--alignment", "none", "--evaluations", "3")
    budget = ("--flops", "0.6", "--keep-image-size", *few)
    methods = ("--methods", "clip/drop/none,random/context/none", "--keep", "0.6")
    kept = ("--keep", "0.6", "--data", images, "--overwrite")
    return {
        "inspect": ("inspect", ckpt),
        "compress": ("compress", ckpt, *kept, "--out", folder / "again"),
        "eval": ("eval", artefact, *labelled, "--compare", ckpt),
        "profile": ("profile", artefact, "--compare", ckpt, "--batch-size", "1", *once),
        "report": ("report", artefact),
        "visualize": ("visualize", artefact, images, "--count", "1", "--out", folder / "pictures", "--overwrite"),
        "sensitivity": ("sensitivity", ckpt, "--calib", images, "--keep", "0.5"),
        "search": ("search", ckpt, "--calib", images, *budget, "--out", folder / "front"),
        "compare": ("compare", ckpt, *methods, *labelled, *once),
        "recipes": ("recipes", "list"),
        "env": ("env",),
    }


NAMES = list(commands(Path(), Path()))


@pytest.mark.parametrize("name", NAMES)
def test_json_is_one_object_and_tables_fit_80_columns(ssmprune: Run, folder: Path, artefact: Path, name: str) -> None:
    arguments = commands(folder, artefact)[name]
    done = ssmprune(*arguments, "--json", steady=True)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert isinstance(data, dict)
    shutil.rmtree(folder / "front", ignore_errors=True)
    # Without a terminal, where ± and box lines do not exist: plain ASCII, no colour.
    done = ssmprune(*arguments, PYTHONIOENCODING="ascii", steady=True)
    shutil.rmtree(folder / "front", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "\x1b" not in done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines()), default=0) <= 80
    for number in headline(name, data):
        assert number in done.stdout, number


def headline(name: str, data: dict[str, Any]) -> list[str]:
    """Numbers of the result that a table must not break or cut."""
    if name == "compress":
        return [f"{data[which]['multiply_adds_all_directions'] / 1e9:.4f}" for which in ("dense", "pruned")]
    if name == "eval":
        return [f"{100 * data['top1']:.2f}", f"{100 * data['dense']['top1']:.2f}"]
    if name == "profile":
        return [f"{model['multiply_adds_one_direction'] / 1e9:.4f}" for model in data["models"]]
    if name == "inspect":
        return [f"{data['parameters']:,}"]
    if name == "sensitivity":
        return [f"{one['multiply_adds']:.3f}" for one in data["measurements"]]
    if name == "search":
        return [f"{one['multiply_adds']:.4f}" for one in data["found"]]
    if name == "compare":
        return [f"{100 * row['top1']:.2f}" for row in data["rows"]]
    return []


# --- terminals


def on_a_terminal(start: Start, *arguments: str | Path, **environment: str) -> str:
    """What the program writes where stdout and stderr are one terminal."""
    parent, child = pty.openpty()
    plain = {"NO_COLOR": None, "CI": None, "TERM": "xterm-256color"}
    process = start(*arguments, terminal=Path(os.ttyname(child)), **{**plain, **environment})
    os.close(child)
    parts = []
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    process.wait()
    os.close(parent)
    return b"".join(parts).decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")  # foreground colours


def test_colour_and_progress_are_for_terminals_and_no_color_is_respected(start: Start, folder: Path) -> None:
    ckpt, out = checkpoint(folder), folder / "terminal"
    arguments = ("compress", ckpt, "--keep", "0.6", "--calib", folder / "images.npz", "--out", out, "--overwrite")
    shown = on_a_terminal(start, *arguments)
    assert COLOUR.search(shown) and "Calibrating" in shown  # the warning about few images is yellow
    assert not COLOUR.search(on_a_terminal(start, *arguments, NO_COLOR="1"))
    assert "Calibrating" not in on_a_terminal(start, *arguments, "--quiet")
