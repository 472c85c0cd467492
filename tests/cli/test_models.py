"""inspect, compress and eval on a small checkpoint in the container that the Vim authors publish."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

Run = Callable[..., subprocess.CompletedProcess[str]]
CHECKPOINT = Path(__file__).parents[1] / "golden" / "containers" / "vim_like.pth"


def test_inspect(ssmprune: Run) -> None:
    facts = json.loads(ssmprune("inspect", CHECKPOINT, "--json").stdout)
    assert (facts["family"], facts["parameters"], facts["tokens"], facts["scan_directions"]) == ("vim", 115306, 65, 2)
    assert facts["container"]["entries"][:2] == ["model", "optimizer"]
    assert facts["sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()
    done = ssmprune("inspect", CHECKPOINT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "115,306" in done.stdout
    assert f"SHA-256 {facts['sha256']}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--family", "resnet"], "'--family': 'resnet' is none of vim, "), (["--weights", "teacher"], "teacher")],
)
def test_inspect_names_a_wrong_option(ssmprune: Run, options: list[str], message: str) -> None:
    done = ssmprune("inspect", CHECKPOINT, *options)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert message in done.stderr
    assert "bug in ssmprune" not in done.stderr


@pytest.fixture(scope="module")
def judged_by_dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose labels are the dense model's own answers, so that its top-1 is 100 %."""
    from ssmprune_cli import checkpoint
    from ssmprune_cli.data import batches, open_dataset

    file = tmp_path_factory.mktemp("data") / "images.npz"
    images = np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)
    np.savez(file, images=images, labels=np.zeros(40, dtype=np.int64))
    model = checkpoint.load(CHECKPOINT)
    with torch.inference_mode():
        logits = [model(batch.images) for batch in batches(open_dataset("npz", file), model.preprocessing, 8)]
    np.savez(file, images=images, labels=torch.cat(logits).argmax(dim=1).numpy())
    return file


@pytest.fixture(scope="module")
def pruned(ssmprune: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with one patch token left after its first block."""
    folder = tmp_path_factory.mktemp("artefact") / "pruned"
    done = ssmprune("compress", CHECKPOINT, "--tokens", "1", "--points", "1", "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_eval_against_itself(ssmprune: Run, judged_by_dense: Path) -> None:
    options = ("--dataset", "npz", "--data", judged_by_dense, "--compare", CHECKPOINT, "--max-drop", "0")
    done = ssmprune("eval", CHECKPOINT, *options, "--json")
    assert done.returncode == 3 and "judged by its upper end" in done.stderr, "40 images do not show that much"
    done = ssmprune("eval", CHECKPOINT, *options, "--judge", "estimate", "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["count"], figures["top1"], figures["dense"]["top1"]) == (40, 1.0, 1.0)
    assert (figures["difference"], figures["p_value"]) == (0.0, 1.0)


@pytest.mark.slow
def test_eval_exits_with_3_beyond_max_drop(ssmprune: Run, judged_by_dense: Path, pruned: Path) -> None:
    options = ("--dataset", "npz", "--data", judged_by_dense, "--compare", CHECKPOINT)
    broken = ssmprune("eval", pruned, *options, "--max-drop", "0.5")
    assert broken.returncode == 3
    assert "--max-drop allows 0.5" in broken.stderr
    assert "40 images" in broken.stdout, "the result is valid, and printed"
    assert "100.00" in broken.stdout
    assert ssmprune("eval", pruned, *options, "--max-drop", "100").returncode == 0


def test_eval_of_fewer_images(ssmprune: Run, judged_by_dense: Path) -> None:
    done = ssmprune("eval", CHECKPOINT, "--dataset", "npz", "--data", judged_by_dense, "--limit", "7", "--json")
    assert json.loads(done.stdout)["count"] == 7


def test_inspect_of_an_artefact(ssmprune: Run, pruned: Path) -> None:
    facts = json.loads(ssmprune("inspect", pruned, "--json").stdout)
    assert facts["parameters"] == 115306
    assert facts["pruning"]["schedule"] == {"points": [1], "tokens": [1], "grids": []}


def test_the_written_recipe_is_complete_and_valid(ssmprune: Run, pruned: Path) -> None:
    done = ssmprune("recipes", "validate", pruned / "recipe.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    recipe = json.loads(ssmprune("recipes", "show", pruned / "recipe.yaml", "--json").stdout)
    assert recipe["pruning"]["points"] == [1]
    assert recipe["provenance"]["input_sha256"] == hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()


def test_eval_refuses_an_unknown_dataset(ssmprune: Run, tmp_path: Path) -> None:
    done = ssmprune("eval", CHECKPOINT, "--dataset", "imagenette", "--data", tmp_path)
    assert done.returncode == 2
    assert "'--dataset': 'imagenette' is none of imagenet, " in done.stderr
