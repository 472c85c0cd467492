"""Distillation on the calibration images: nearer to the dense model on images held back, or nothing is changed."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, calibration_images
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone, Size, smaller
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import Asked, compress, divergence, repair
from ssmprune_cli.recipe import Pruning, Recipe
from ssmprune_cli.workflows.compress import distillation
from ssmprune_cli.workflows.compress.distillation import SETTINGS, distil
from ssmprune_cli.workflows.trials import Prepared, run

CONFIG = VimConfig(image_size=(16, 16), patch_size=4, stride=4, embed_dim=16, depth=4, num_classes=5)


def dense_model() -> Backbone:
    """One whose answers differ from image to image, and whose tokens count."""
    torch.manual_seed(0)
    model = Vim(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        model.output_layer.weight.mul_(6.0)
    return model


@pytest.fixture
def images(tmp_path: Path) -> ImageDataset:
    """Two hundred smooth ones: what is learnt of one holds for others."""
    coarse = np.random.default_rng(0).integers(0, 256, (200, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "calib.npz", images=coarse.repeat(4, axis=1).repeat(4, axis=2))
    return calibration_images(tmp_path / "calib.npz", 200, 0)


def logits(model: Backbone, images: ImageDataset) -> Tensor:
    return run(prepare(model), Prepared(model, images, 32))


def pruned(dense: Backbone) -> Backbone:
    model = copy.deepcopy(dense)
    compress(model, 0.3, points=[1], repair="none")
    return model


@pytest.mark.parametrize("kind", ["none", "auto"])
@pytest.mark.parametrize("way", ["tokens", "smaller image"])
def test_it_comes_nearer_to_the_dense_model(images: ImageDataset, kind: Asked, way: str) -> None:
    dense = dense_model()
    model = pruned(dense) if way == "tokens" else smaller(dense, Size(8))
    wanted = logits(dense, images)
    steps: list[tuple[int, int]] = []
    weights = copy.deepcopy(dense.state_dict())

    def done(step: int, of: int) -> None:
        steps.append((step, of))

    found = distil(model, images, dense, 60, dense=wanted, kind=kind, done=done)
    assert found.kept and found.divergence_after is not None and found.change_interval is not None
    assert found.divergence_after < (0.8 if kind == "none" else 0.95) * found.divergence_before
    assert found.change_interval[1] < 0
    assert (found.images, found.held_back, found.steps) == (200, 40, 60)
    assert steps == [(step, 60) for step in range(1, 61)]
    held = list(range(0, 200, 5))
    far = divergence(wanted[held], logits(model, images)[held])
    assert float(far.mean()) == pytest.approx(found.divergence_after, rel=1e-4), "what is delivered is what was judged"
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())


def test_the_same_seed_gives_the_same_weights(images: ImageDataset) -> None:
    dense = dense_model()
    models, wanted = [pruned(dense) for _ in range(3)], logits(dense, images)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        distil(model, images, dense, 30, dense=wanted, kind="none", seed=seed)
    first, again, other = (model.state_dict() for model in models)
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not all(torch.equal(value, other[name]) for name, value in first.items())


@pytest.mark.parametrize("rate", [1e-9, 1e6])
def test_what_does_not_pay_changes_nothing(images: ImageDataset, rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps too small to help, and steps that end in numbers that are not finite, or far off."""
    monkeypatch.setattr(distillation, "SETTINGS", SETTINGS.model_copy(update={"lr": rate}))
    dense = dense_model()
    model = pruned(dense)
    repair(model, Prepared(model, images, 32), kind="auto", runner=prepare(model).with_pruner)
    before, answers = copy.deepcopy(model.state_dict()), logits(model, images)
    found = distil(model, images, dense, 5, dense=logits(dense, images), kind="auto")
    assert not found.kept
    now = model.state_dict()
    assert set(now) == set(before) and all(torch.equal(value, before[name]) for name, value in now.items())
    assert torch.equal(logits(model, images), answers)


def test_what_cannot_be_taught(images: ImageDataset, tmp_path: Path) -> None:
    dense = dense_model()
    with pytest.raises(UsageError, match="no token is dropped and the model is no smaller"):
        distil(copy.deepcopy(dense), images, dense, 5, dense=logits(dense, images), kind="none")
    np.savez(tmp_path / "few.npz", images=np.random.default_rng(0).integers(0, 256, (63, 16, 16, 3), dtype=np.uint8))
    few = calibration_images(tmp_path / "few.npz", 63, 0)
    with pytest.raises(DataError, match="63 images are too few to learn from: it takes 64"):
        distil(pruned(dense), few, dense, 5, dense=logits(dense, few), kind="none")


def ssmprune(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ssmprune_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(images: ImageDataset, tmp_path: Path) -> None:
    """The report says what it gained, the recipe makes the same model again, and the artefact is that model."""
    checkpoint.save(tmp_path / "dense", dense_model())
    calib, out = tmp_path / "calib.npz", tmp_path / "fast"
    asked = ("--keep", "0.3", "--points", "1", "--reduction", "context", "--calib", calib, "--samples", "0")
    done = ssmprune("compress", tmp_path / "dense", *asked, "--distill-steps", "60", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "Distillation: 60 steps on 200 images, divergence " in done.stdout
    facts = json.loads((out / "report.json").read_text())
    assert facts["distillation"]["kept"] and facts["distillation"]["steps"] == 60
    assert "Distillation" in (out / "report.html").read_text() and "Distillation: 60" in (out / "README.md").read_text()
    model, held = checkpoint.load(out), list(range(0, 200, 5))
    far = divergence(logits(dense_model(), images)[held], logits(model, images)[held])
    assert float(far.mean()) == pytest.approx(facts["distillation"]["divergence_after"], rel=1e-4)
    again = ("--recipe", out / "recipe.yaml", "--calib", calib, "--samples", "0", "--out", tmp_path / "again")
    done = ssmprune("compress", tmp_path / "dense", *again)
    assert done.returncode == 0, done.stderr
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, tmp_path / "again")]
    assert weights[0] == weights[1]


def test_in_eight_bits_the_trained_model_is_rounded(images: ImageDataset, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "dense", dense_model())
    asked = ("--keep", "0.3", "--points", "1", "--reduction", "context", "--calib", tmp_path / "calib.npz", "--int8")
    done = ssmprune("compress", tmp_path / "dense", *asked, "--distill-steps", "60", "--out", tmp_path / "fast")
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "fast" / "report.json").read_text())
    assert facts["distillation"]["kept"]
    model, held = checkpoint.load(tmp_path / "fast"), list(range(0, 200, 5))
    assert model.eight_bit_kinds
    far = divergence(logits(dense_model(), images)[held], logits(model, images)[held])
    assert float(far.mean()) < facts["distillation"]["divergence_before"], "bytes cost less than steps gain"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep", "0.5", "--distill-steps", "0"), "distill-steps"),
        (("--keep", "0.5", "--distill-steps", "5"), "--distill-steps needs --calib, the images to learn from"),
        (("--int8", "--calib", "calib.npz", "--distill-steps", "5"), "there is nothing to learn"),
    ],
)
def test_wrong_usage(images: ImageDataset, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    checkpoint.save(tmp_path / "dense", dense_model())
    given = [str(tmp_path / each) if each == "calib.npz" else each for each in options]
    done = ssmprune("compress", tmp_path / "dense", *given, "--out", tmp_path / "fast")
    assert done.returncode == 2 and said in " ".join(done.stderr.split()) and done.stdout == ""
    assert not (tmp_path / "fast").exists()


def test_a_recipe_without_images_says_what_it_leaves_out(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "dense", dense_model())
    recipe = Recipe(name="taught", pruning=Pruning(keep=0.5, points=(1,), distill_steps=5))
    (tmp_path / "taught.yaml").write_text(recipe.to_yaml())
    out = tmp_path / "fast"
    done = ssmprune("compress", tmp_path / "dense", "--recipe", tmp_path / "taught.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "The recipe's distillation was left out: no calibration images were given." in done.stderr
