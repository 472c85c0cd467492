"""search, compress with a target, sensitivity and compare as processes."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from ssmprune_cli.models import FAMILIES
from ssmprune_cli.recipe.recipe import load_recipe, shipped_recipes
from ssmprune_cli.report.report import SearchTrial
from tests.cli.conftest import Process, Run, Start

ROOT = Path(__file__).parents[2]
CHECKPOINT = ROOT / "tests" / "golden" / "containers" / "vim_like.pth"
SAME_IMAGES = ("--keep-image-size",)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 labelled images of noise."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    np.savez(path, images=pixels, labels=np.arange(12) % 10)
    return path


def killed(process: Process, state: Path) -> dict[str, object]:
    """What the command had found when it was killed, soon after its first result."""
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline and not process.ended():
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    results: dict[str, object] = json.loads(state.read_text())["results"]  # whole at any moment
    assert results
    return results


def test_compress_for_a_target_survives_a_kill(ssmprune: Run, start: Start, images: Path, tmp_path: Path) -> None:
    out, state = tmp_path / "out", tmp_path / "out.search-state.json"
    few = ("--importance", "clip", "--reduction", "drop", "--evaluations", "15", *SAME_IMAGES)
    command = ("compress", CHECKPOINT, "--target-flops", "0.7", "--calib", images, *few, "--out", out, "--json")
    killed(start(*command, steady=True), state)
    assert not out.exists()
    done = ssmprune(*command, steady=True)
    assert done.returncode == 0, done.stderr
    assert "continues an earlier run" in done.stderr
    assert not state.exists()
    report = json.loads(done.stdout)
    dense, pruned = (report[key]["multiply_adds_all_directions"] for key in ("dense", "pruned"))
    assert 0.68 < pruned / dense <= 0.7
    trace = json.loads((out / "report.json").read_text())["search"]
    (chosen,) = [entry for entry in trace if entry["chosen"]]
    assert chosen["multiply_adds"] == pytest.approx(pruned / dense, rel=1e-9)
    assert chosen["pruning"]["tokens"] == report["pruning"]["tokens"]
    assert load_recipe(out / "recipe.yaml").pruning.tokens == tuple(report["pruning"]["tokens"])
    again = tmp_path / "again"
    done = ssmprune("compress", CHECKPOINT, "--recipe", out / "recipe.yaml", "--calib", images, "--out", again)
    assert done.returncode == 0, done.stderr
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target-flops", "0.01"], 2, "cannot be reached"),
        (["--target-flops", "0.8", "--keep", "0.5"], 2, "a target settles what to keep"),
        (["--target-flops", "0.8", "--dry-run"], 2, "cannot be a dry run"),
    ],
)
def test_refusals(ssmprune: Run, images: Path, tmp_path: Path, options: list[str], code: int, message: str) -> None:
    done = ssmprune("compress", CHECKPOINT, *options, "--reduction", "drop", "--calib", images, "--out", tmp_path / "o")
    assert done.returncode == code, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert not (tmp_path / "o").exists()


def test_search_writes_a_recipe_a_budget(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "front"
    few = ("--importance", "clip", "--reduction", "drop", "--alignment", "none", "--evaluations", "6", *SAME_IMAGES)
    command = ("search", CHECKPOINT, "--calib", images, "--flops", "0.7,0.6", *few, "--out", out)
    done = ssmprune(*command, steady=True)
    assert done.returncode == 0, done.stderr
    assert "Only 12 of 256 calibration images" in done.stderr and "12 images are few" in done.stderr
    assert {file.name for file in out.iterdir()} == {"flops_0.7.yaml", "flops_0.6.yaml", "search.json", "front.svg"}
    assert load_recipe(out / "flops_0.6.yaml").pruning.reduction == "drop"
    trace = [SearchTrial(**entry) for entry in json.loads((out / "search.json").read_text())]
    assert [(each.kind, each.budget) for each in trace if each.chosen] == [("flops", 0.7), ("flops", 0.6)]
    assert all(each.latency_ratio is not None for each in trace if each.chosen)
    ElementTree.parse(out / "front.svg")
    done = ssmprune(*command)
    assert done.returncode == 2 and "not empty" in done.stderr


def test_a_search_in_eight_bits(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    few = ("--importance", "clip", "--reduction", "drop", "--alignment", "none", "--evaluations", "3", *SAME_IMAGES)
    done = ssmprune(
        "search",
        CHECKPOINT,
        "--int8",
        "--calib",
        images,
        "--flops",
        "0.7",
        *few,
        "--out",
        tmp_path / "front",
        steady=True,
    )
    assert done.returncode == 0 and "int8; " in done.stdout, done.stderr
    pruning = load_recipe(tmp_path / "front" / "flops_0.7.yaml").pruning
    assert pruning.weights == "int8" and pruning.int8 is not None and "in_proj" in pruning.int8


def test_compress_for_a_time(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    """What was searched for on the steady clock is measured by the machine's in the end, and may be missed."""
    few = ("--importance", "clip", "--reduction", "drop", "--evaluations", "5", "--batch-size", "4", *SAME_IMAGES)
    command = ("compress", CHECKPOINT, "--target-speedup", "1.15", *few, "--calib", images, "--out", tmp_path / "time")
    done = ssmprune(*command, "--json", steady=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    target = report["target"]
    assert (target["kind"], target["value"]) == ("latency_ratio", pytest.approx(1 / 1.15))
    assert target["measured"] == report["speed"]["latency_ratio"] and report["speed"]["batch_size"] == 4
    assert target["met"] == (target["measured"] <= target["value"]) == ("were measured in the end" not in done.stderr)


def test_sensitivity(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = ssmprune("sensitivity", CHECKPOINT, "--calib", images, "--keep", "0.9,0.5", "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    assert "6 measurements, about" in done.stderr
    assert json.loads((out / "sensitivity.json").read_text()) == json.loads(done.stdout)
    found = json.loads(done.stdout)["measurements"]
    assert [(one["point"], one["keep"]) for one in found] == [(p, k) for p in (1, 2, 3) for k in (0.9, 0.5)]
    for soft, hard in zip(found[::2], found[1::2], strict=True):
        assert 0 < hard["multiply_adds"] < soft["multiply_adds"] < 1
        assert 0 < soft["token_error"] < hard["token_error"] and soft["divergence"] >= 0
    assert list(tmp_path.iterdir()) == [out], "the state is removed at the end"


def test_sensitivity_survives_a_kill(ssmprune: Run, start: Start, images: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    command = ("sensitivity", CHECKPOINT, "--calib", images, "--keep", "0.9,0.7,0.5", "--state", state, "--json")
    known = killed(start(*command), state)
    done = ssmprune(*command)
    assert done.returncode == 0, done.stderr
    assert f"{len(known)} results are known already" in done.stderr or len(known) == 1, "after the dense pass"
    found = {(one["point"], one["keep"]): one for one in json.loads(done.stdout)["measurements"]}
    for key, value in known.items():
        if key.startswith("sensitivity"):
            _, point, keep = key.split()
            assert isinstance(value, dict) and value.items() <= found[int(point), float(keep)].items()
    assert not state.exists()


def test_compare_at_equal_cost(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    options = (
        "--methods",
        "clip/drop/none,clip/context/none",
        "--flops",
        "0.8",
        "--rounds",
        "1",
        "--dense",
        CHECKPOINT,
    )
    done = ssmprune("compare", CHECKPOINT, "--data", images, *options, "--plot", plot, "--json")
    assert done.returncode == 0, done.stderr
    dense, other, drop, context, smaller, cut = json.loads(done.stdout)["rows"]
    assert dense["share"] == other["share"] == 1 and dense["divergence"] == 0 and other["divergence"] is None
    assert (drop["name"], context["name"]) == ("clip/drop/none", "clip/context/none")
    assert smaller["name"] == "smaller image" and smaller["points"] == smaller["tokens"] == []
    assert cut["name"] == "cut short by 1 block" and cut["points"] == []
    for row, least in ((drop, 0.75), (context, 0.75), (smaller, 0.5), (cut, 0.5)):
        assert least < row["share"] <= 0.8 and row["divergence"] > 0 and row["budget"] == "flops 0.8"
        low, high = row["difference_interval"]
        assert low <= row["difference"] <= high and row["difference"] == pytest.approx(row["top1"] - dense["top1"])
    for file in (plot, tmp_path / "plot_speed.svg"):
        ElementTree.parse(file)


def test_the_published_recipes_carry_their_numbers() -> None:
    published = {name: load_recipe(file).published for name, file in shipped_recipes().items()}
    known = {name: (each.top1, each.multiply_adds) for name, each in published.items() if each is not None}
    assert known["vim_small_topvim"] == (78.8, 3.6) and known["vim_small_rmeeto"] == (79.9, 3.58)
    assert known["vim_tiny_evit"] == (71.3, 1.28) and known["vim_base_mtr"] == (80.3, 11.3)


@pytest.mark.slow
def test_the_table_of_published_methods(ssmprune: Run, tmp_path: Path) -> None:
    """A Vim-Tiny of random weights in the place of the published one: every recipe for it runs, beside its paper's."""
    torch.manual_seed(0)
    vim = FAMILIES.get("vim")
    model = vim.build(vim.variants["vim_tiny"])
    torch.save({"model": model.state_dict()}, tmp_path / "vim_t_midclstok_76p1acc.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 224, 224, 3), dtype=np.uint8)
    np.savez(tmp_path / "two.npz", images=pixels, labels=np.array([3, 999]))
    options = ("--data", tmp_path / "two.npz", "--dataset", "npz", "--checkpoints", tmp_path, "--rounds", "1")
    done = ssmprune("compare", "--table", "imagenet-vim", *options, "--batch-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    assert "vim_s_midclstok_80p5acc.pth is not in" in done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)["rows"]}
    assert set(rows) == {
        "vim_t_midclstok_76p1acc.pth", "vim_tiny_topvim", "vim_tiny_evit", "vim_tiny_rmeeto",
    }  # fmt: skip
    for name, row in rows.items():
        assert row["top1"] in (0, 0.5, 1)
        assert (row["share"] == 1) == name.endswith(".pth")


def test_the_table_without_its_checkpoints_says_which(ssmprune: Run, images: Path, tmp_path: Path) -> None:
    options = ("--dataset", "npz", "--data", images, "--checkpoints", tmp_path)
    done = ssmprune("compare", "--table", "imagenet-vim", *options)
    assert done.returncode == 2
    assert "vim_s_midclstok_80p5acc.pth is not in" in done.stderr
