"""train, and visualize on what it made, as processes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssmprune_cli import checkpoint

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images.npz, and model.pth and train.log of one epoch on them."""
    folder = tmp_path_factory.mktemp("train")
    images = np.random.default_rng(0).integers(0, 256, (16, 20, 16), dtype=np.uint8)  # taller than the model's images
    np.savez(folder / "images.npz", images=images, labels=np.arange(16) % 2)
    return folder


@pytest.fixture(scope="module")
def trained(ssmprune: Run, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]
    data, out = folder / "images.npz", folder / "model.pth"
    options = ["--dataset", "npz", "--data-dir", data, "--val-dir", data, "--out", out, "--log", folder / "train.log"]
    sets = [part for setting in settings for part in ("--set", setting)]
    return ssmprune("train", *sets, *options, "--epochs", "1", "--batch-size", "8", "--json")


def test_train_writes_a_checkpoint_and_a_log(
    ssmprune: Run, trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    assert trained.returncode == 0, trained.stderr
    result = json.loads(trained.stdout)
    assert result["checkpoint"] == str(folder / "model.pth") and not result["interrupted"]
    header, *epochs = map(json.loads, (folder / "train.log").read_text().splitlines())
    assert epochs == result["epochs"] and [epoch["epoch"] for epoch in epochs] == [1]
    assert header["command"].startswith("ssmprune train --set") and header["settings"]["batch_size"] == 8
    facts = json.loads(ssmprune("inspect", folder / "model.pth", "--json").stdout)
    found = {key: facts[key] for key in ("family", "image_size", "tokens", "dtype")}
    assert found == {"family": "vim", "image_size": [16, 16], "tokens": 17, "dtype": {"float16": 75}}


def test_init_starts_from_a_checkpoint_of_the_same_configuration(
    ssmprune: Run, trained: subprocess.CompletedProcess[str], folder: Path
) -> None:
    """With a learning rate of next to nothing, the weights are those it started from."""
    settings = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]
    sets = [part for setting in settings for part in ("--set", setting)]
    start, out = folder / "model.pth", folder / "more.pth"
    common = ("--init", start, "--dataset", "npz", "--data-dir", folder / "images.npz", "--epochs", "1", "--seed", "7")
    done = ssmprune("train", *sets, *common, "--out", out, "--lr", "1e-12")
    assert done.returncode == 0, done.stderr
    before, after = checkpoint.load(start).state_dict(), checkpoint.load(out).state_dict()
    assert all(torch.allclose(before[key], after[key], rtol=0, atol=1e-6) for key in before)
    other = ssmprune("train", *sets, "--set", "depth=3", *common, "--out", folder / "none.pth")
    assert other.returncode == 2 and "holds another configuration: depth is 4, not 3" in other.stderr
    assert not (folder / "none.pth").exists()


def test_train_refuses_settings_before_it_starts(ssmprune: Run, folder: Path) -> None:
    out = folder / "none.pth"
    done = ssmprune("train", "--dataset", "npz", "--data-dir", folder / "images.npz", "--out", out, "--set", "depth=0")
    assert (done.returncode, out.exists()) == (2, False)
    assert "depth must be at least 1" in done.stderr


@pytest.mark.usefixtures("trained")
def test_visualize_draws_what_compress_left(ssmprune: Run, folder: Path) -> None:
    data, artefact, picture = folder / "images.npz", folder / "pruned", folder / "kept.png"
    assert ssmprune("compress", folder / "model.pth", "--keep", "0.5", "--out", artefact).returncode == 0
    done = ssmprune("visualize", artefact, data, "--out", picture, "--count", "3", "--json")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout)["stages"]
    assert stages == [{"after_block": block, "kept": kept, "patches": 16} for block, kept in ((1, 8), (2, 4), (3, 2))]
    assert picture.read_bytes().startswith(b"\x89PNG")
    dense = ssmprune("visualize", folder / "model.pth", data, "--out", folder / "dense.png")
    assert dense.returncode == 2 and "drops no tokens" in dense.stderr
