"""`ssmprune_cli.save`: what the program writes, byte for byte, and what cannot be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import ssmprune_cli
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Correction, TokenPruner
from ssmprune_cli.recipe import load_recipe
from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
from ssmprune_cli.workflows.source import Source

GOLDEN = Path(__file__).parents[1] / "golden" / "containers"
SAME = ("model.safetensors", "config.json")


@pytest.fixture
def model() -> Backbone:
    return ssmprune_cli.load(GOLDEN / "vim_like.pth")


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def assert_same(first: Path, second: Path, names: tuple[str, ...] = SAME) -> None:
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@pytest.mark.parametrize("name", ["vim_like.pth", "plainmamba_like_ema.pth", "vmamba_4d_weights.pth"])
def test_an_artefact_goes_through_python_byte_for_byte(name: str, tmp_path: Path) -> None:
    side = None if name == "vim_like.pth" else 64
    ssmprune_cli.save(ssmprune_cli.load(GOLDEN / name, image_size=side), tmp_path / "dense")
    compress_checkpoint(CompressRequest(Source(tmp_path / "dense"), keep="0.6", out=tmp_path / "out"))
    ssmprune_cli.save(ssmprune_cli.load(tmp_path / "out"), tmp_path / "saved")
    assert_same(tmp_path / "out", tmp_path / "saved")


def test_a_model_compressed_in_python_comes_back_with_recipe_and_card(
    model: Backbone, images: Tensor, tmp_path: Path
) -> None:
    ssmprune_cli.compress(model, keep=0.6, calibration=images, seed=3)
    ssmprune_cli.save(model, tmp_path / "one")
    found = ssmprune_cli.load(str(tmp_path / "one"))
    ssmprune_cli.save(found, tmp_path / "two")
    names = ("README.md", "config.json", "model.safetensors", "recipe.yaml")
    assert sorted(file.name for file in (tmp_path / "one").iterdir()) == sorted(names)
    assert_same(tmp_path / "one", tmp_path / "two", names)
    with torch.inference_mode():
        assert torch.equal(found(images), model(images))
    recipe = load_recipe(tmp_path / "one/recipe.yaml")
    assert isinstance(model.pruner, TokenPruner)
    assert (recipe.pruning.points, recipe.pruning.tokens) == ((1, 2, 3), model.pruner.settings.schedule.tokens)
    assert (recipe.pruning.alignment, recipe.pruning.repair, recipe.seed) == ("calibrated", "none", 3)
    head = yaml.safe_load((tmp_path / "one/README.md").read_text().split("---\n")[1])
    assert head == {
        "library_name": "ssmprune",
        "pipeline_tag": "image-classification",
        "tags": ["state-space-model", "mamba", "vim", "token-pruning"],
    }
    again = CompressRequest(Source(GOLDEN / "vim_like.pth"), recipe=str(tmp_path / "one/recipe.yaml"), dry_run=True)
    with pytest.raises(UsageError, match="alignment 'calibrated' needs calibration images"):
        compress_checkpoint(again)


def test_a_resized_model_keeps_what_it_was(model: Backbone, tmp_path: Path) -> None:
    small = ssmprune_cli.resize(model, 48)
    ssmprune_cli.compress(small, keep=0.6)
    ssmprune_cli.save(small, tmp_path / "with", dense=model)
    ssmprune_cli.save(small, tmp_path / "without")
    assert_same(tmp_path / "with", tmp_path / "without", (*SAME, "recipe.yaml"))
    assert load_recipe(tmp_path / "with/recipe.yaml").pruning.image_size == 48
    assert Source(tmp_path / "with").load().config == model.config
    with pytest.raises(CheckpointError, match=r"there is no dense\.safetensors"):
        Source(tmp_path / "without").load()
    with pytest.raises(UsageError, match="dense: is not the model that the other one was made of"):
        ssmprune_cli.save(model, tmp_path / "dense", dense=small)


def test_how_tokens_come_back_is_in_the_recipe(tmp_path: Path) -> None:
    model = ssmprune_cli.load(GOLDEN / "vmamba_4d_weights.pth", image_size=64)
    ssmprune_cli.compress(model, keep=0.6, returning="nearest", reduction="drop")
    ssmprune_cli.save(model, tmp_path / "out")
    assert load_recipe(tmp_path / "out/recipe.yaml").pruning.returning == "nearest"
    assert repr(ssmprune_cli.load(tmp_path / "out").pruner) == repr(model.pruner)


def test_what_a_recipe_cannot_say_is_said_on_the_card(model: Backbone, images: Tensor, tmp_path: Path) -> None:
    ssmprune_cli.compress(model, keep=0.6, calibration=images)
    assert isinstance(model.pruner, TokenPruner)
    widths = {point: torch.zeros(48, 48) for point in model.pruner.dropping_points}
    model.pruner.correct(Correction(None, widths))  # as a training leaves it, with the repaired head in the weights
    ssmprune_cli.save(model, tmp_path / "out")
    assert not (tmp_path / "out/recipe.yaml").exists()
    card = (tmp_path / "out/README.md").read_text()
    assert "> There is no recipe.yaml: it cannot say that the head was merged into the weights after a repair." in card
    assert repr(ssmprune_cli.load(tmp_path / "out").pruner) == repr(model.pruner)


class Odd(nn.Module):
    pass


def nan(model: Any) -> Any:
    model.head.bias.data[0] = torch.nan
    return model


def adapted(model: Any) -> Any:
    model.head.extra = nn.Linear(2, 2)
    return model


def with_odd_pruner(model: Any) -> Any:
    model.pruner = Odd()
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (ssmprune_cli.prepare, "a session is a snapshot that cannot be saved\nSave the model"),
        (lambda model: model.head, "a Linear is no model of ssmprune"),
        (lambda model: model.to("meta"), "its weights are on the meta device"),
        (nan, r"1 weights have values that are not finite: head\.bias"),
        (adapted, r"head\.extra\.weight is unknown(.|\n)*Merge or remove"),
        (with_odd_pruner, "its pruner is a Odd, which a folder cannot hold"),
    ],
    ids=["session", "module", "meta", "nan", "adapter", "pruner"],
)
def test_what_could_not_be_loaded_is_not_saved(change: Any, message: str, model: Backbone, tmp_path: Path) -> None:
    changed = change(model)
    with pytest.raises((UsageError, CheckpointError), match=message):
        ssmprune_cli.save(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_an_output_of_ours_is_overwritten(model: Backbone, tmp_path: Path) -> None:
    ssmprune_cli.save(model, tmp_path / "out")
    with pytest.raises(CheckpointError, match="the folder is not empty"):
        ssmprune_cli.save(model, tmp_path / "out")
    ssmprune_cli.save(model, tmp_path / "out", overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="something else than an output of ssmprune"):
        ssmprune_cli.save_pretrained(model, tmp_path / "mine")
