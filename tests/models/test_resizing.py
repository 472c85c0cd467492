"""The same weights for smaller images: what is resized, what is refused, which part of an image the model then sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ssmprune_cli as ssmprune
from ssmprune_cli import checkpoint
from ssmprune_cli.data.preprocess import normalised, preprocess, visible_box
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.export import export
from ssmprune_cli.models import FAMILIES, Backbone, resize, sides
from ssmprune_cli.preprocessing import Preprocessing, Reading, of_images

MAMBA = {"image_size": 64, "patch_size": 8, "stride": 8, "embed_dim": 16, "depth": 2, "num_classes": 3, "d_state": 4}
VMAMBA = {"image_size": 64, "embed_dim": 8, "depths": (2, 1), "num_classes": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"vim, class token {kind}": ("vim", {**MAMBA, "class_token": kind}) for kind in ("middle", "head", "double")},
    "vim, mean": ("vim", {**MAMBA, "class_token": "none"}),
    "vim, rope": ("vim", {**MAMBA, "class_token": "head", "rope": True}),
    "vim, overlapping": ("vim", {**MAMBA, "stride": 4}),
    "videomamba": ("videomamba", MAMBA),
    "mambar": ("mambar", {**MAMBA, "num_cls_tokens": 4}),
    "localvim": ("localvim", MAMBA),
    "localvim, class token": ("localvim", {**MAMBA, "class_token": "middle", "rope": False}),
    "plainmamba": ("plainmamba", {key: value for key, value in MAMBA.items() if key != "stride"}),
    "vmamba": ("vmamba", VMAMBA),
    "localvmamba": ("localvmamba", VMAMBA),
    "medmamba": ("medmamba", VMAMBA),
    "efficientvmamba": ("efficientvmamba", {**VMAMBA, "depths": (2, 1, 1, 1)}),
    "vmamba v0": ("vmamba", {**VMAMBA, "patch_embed": "v1", "downsample": "v1"}),
}


def build(name: str, **changes: Any) -> Backbone:
    family, values = MODELS[name]
    torch.manual_seed(0)
    known = FAMILIES.get(family)
    return known.build(known.config_class(**{**values, **changes})).eval()


def same(first: Backbone, second: Backbone) -> bool:
    ours, others = first.state_dict(), second.state_dict()
    return ours.keys() == others.keys() and all(torch.equal(ours[key], others[key]) for key in ours)


@pytest.mark.parametrize("name", MODELS)
def test_a_resized_model_is_what_the_checkpoint_gives_at_that_size(name: str, tmp_path: Path) -> None:
    model = build(name)
    checkpoint.save(tmp_path / "dense", model)
    side = sides(model)[min(2, len(sides(model)) - 2)]
    smaller, loaded = ssmprune.resize(model, side), ssmprune.load(tmp_path / "dense", image_size=side)
    assert same(smaller, loaded) and smaller.image_size == (side, side) and not smaller.training
    assert smaller.config == replace(loaded.config, resized_from=(64, 64))
    assert smaller.preprocessing == loaded.preprocessing
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        assert torch.equal(smaller(images), loaded(images))
        assert torch.allclose(ssmprune.prepare(smaller)(images), smaller(images), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_at_its_own_side_it_is_a_copy_bit_for_bit(name: str) -> None:
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    copy = resize(model, 64)
    assert same(copy, model) and copy.config == model.config and copy.training
    assert [each.requires_grad for each in copy.parameters()] == [each.requires_grad for each in model.parameters()]
    assert {each.data_ptr() for each in copy.parameters()}.isdisjoint(each.data_ptr() for each in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_it_sees_the_same_part_of_an_image(name: str) -> None:
    model = build(name)
    for side in (56 if 56 in sides(model) else 48, 32):
        smaller = resize(model, side).preprocessing
        assert isinstance(smaller, Preprocessing) and smaller.crop == side
        before, after = (np.array(visible_box((90, 70), of_images(each))) for each in (model.preprocessing, smaller))
        assert np.abs(before - after).max() < 70 / side  # `resize` is a whole number of pixels
    small = build(name, image_size=32).preprocessing
    assert isinstance(small, Preprocessing) and small.resize == 32  # while a small model is not cropped at all


def test_a_smaller_model_of_a_small_one_sees_a_scaled_image_and_no_crop() -> None:
    """As the CIFAR-10 Vim-Tiny: images of 32 pixels, and a model for 26."""
    smaller = resize(build("vim, class token middle", image_size=32, patch_size=4, stride=2), 26)
    assert smaller.grid == (12, 12) and smaller.preprocessing == Preprocessing(26, 26)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = image.resize((26, 26), Image.Resampling.BICUBIC)
    assert torch.equal(
        preprocess(image, smaller.preprocessing), torch.from_numpy(normalised(whole, Preprocessing(0, 0)))
    )


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("vim, class token middle", {}, (56, 48, 40, 32)),
        ("vim, overlapping", {}, (60, 56, 52, 48, 44, 40, 36, 32)),
        ("plainmamba", {"image_size": 60}, (56, 48, 40, 32)),  # padded
        ("vmamba", {"image_size": 20}, (16, 12)),
        ("mambar", {"image_size": (64, 32)}, ()),
    ],
)
def test_sides_are_those_that_patches_fill(name: str, changes: dict[str, Any], expected: tuple[int, ...]) -> None:
    model = build(name, **changes)
    assert sides(model) == expected
    for side in expected[:1]:
        assert sides(resize(model, side)) == ()


@pytest.mark.parametrize(
    ("name", "side", "hint"),
    [
        ("vim, class token middle", 50, "48 or 56"),
        ("vim, overlapping", 50, "48 or 52"),
        ("vim, class token head", 3, "nearby: 8."),
        ("videomamba", -1, "nearby: 8."),
        ("mambar", 63, "56 or 64"),
        ("plainmamba", 50, "48 or 56"),
        ("vmamba", 50, "48 or 52"),
        ("vmamba", 0, "nearby: 4."),
        ("plainmamba", 10**9 + 1, "nearby: 16376."),
    ],
)
def test_a_side_that_patches_do_not_fill_is_refused_with_those_nearby(name: str, side: int, hint: str) -> None:
    with pytest.raises(UsageError, match=hint) as caught:
        resize(build(name), side)
    assert str(side) in caught.value.what


def test_what_cannot_be_resized_is_refused_by_name() -> None:
    model = build("vim, class token middle")
    with pytest.raises(UsageError, match="resized before, from 64 to 48"):
        resize(resize(model, 48), 40)
    assert same(resize(resize(model, 48), 48), resize(model, 48))
    with pytest.raises(UsageError, match="64 x 32 pixels are not square"):
        resize(build("vim, class token middle", image_size=(64, 32)), 32)
    ssmprune.compress(model, 0.5)
    with pytest.raises(UsageError, match="a model that drops tokens is fixed"):
        resize(model, 48)
    with pytest.raises(UsageError, match="a Linear has no position embeddings"):
        resize(torch.nn.Linear(1, 1), 48)  # type: ignore[arg-type]


def test_rotary_tables_that_are_not_known_are_refused() -> None:
    model = build("vim, rope")
    resize(model.half(), 48)  # as published: rounded
    model.get_buffer("rope.freqs_cos")[5] += 0.1
    with pytest.raises(UsageError, match=r"rope\.freqs_cos: the rotary tables for 8 x 8 patches are others"):
        resize(model, 48)


def test_weights_keep_their_dtype() -> None:
    model = build("vim, class token middle").to(torch.bfloat16)
    smaller = resize(model, 48)
    assert smaller.dtype == torch.bfloat16
    exact = resize(build("vim, class token middle").to(torch.bfloat16).float(), 48)
    assert torch.equal(smaller.get_parameter("pos_embed"), exact.get_parameter("pos_embed").to(torch.bfloat16))


@pytest.mark.parametrize("name", ["vim, class token middle", "vim, rope", "mambar", "plainmamba", "vmamba"])
def test_an_artefact_knows_the_dense_model_that_it_was_made_of(name: str, tmp_path: Path) -> None:
    model, folder = build(name), tmp_path / "small"
    smaller = resize(model, 48)
    ssmprune.compress(smaller, 0.5, reduction="drop", alignment="none")
    checkpoint.save(folder, smaller, dense=model)
    assert same(checkpoint.load(folder), smaller) and checkpoint.is_compressed(folder)
    dense = checkpoint.load_as(folder, Reading(), dense=True)
    assert same(dense, model) and dense.config == model.config and dense.pruner is None
    assert same(checkpoint.load_as(folder, Reading(image_size=56), dense=True), resize(model, 56))
    assert checkpoint.load(folder, image_size=64).image_size == (48, 48)  # true of the dense model
    with pytest.raises(CheckpointError, match="image size of a compressed model is fixed"):
        checkpoint.load(folder, image_size=56)


def test_a_resized_model_that_was_trained_has_no_dense_one(tmp_path: Path) -> None:
    model = build("vim, class token middle")
    checkpoint.save(tmp_path / "first", resize(model, 48), dense=model)
    before = checkpoint.sha256(tmp_path / "first")
    (tmp_path / "first" / "dense.safetensors").unlink()
    assert checkpoint.sha256(tmp_path / "first") != before
    assert checkpoint.load(tmp_path / "first").image_size == (48, 48)
    with pytest.raises(CheckpointError, match=r"there is no dense\.safetensors"):
        checkpoint.load_as(tmp_path / "first", Reading(), dense=True)


@pytest.mark.parametrize("size", ["[2, 2]", "[-1, 64]", "[64]", '"64"', "[1e99, 64]"])
def test_a_damaged_size_of_the_dense_model_is_no_crash(size: str, tmp_path: Path) -> None:
    model, folder = build("vim, class token middle"), tmp_path / "small"
    checkpoint.save(folder, resize(model, 48), dense=model)
    text = (folder / "config.json").read_text()
    start = text.index('"resized_from"')
    end = text.index("]", start) + 1
    (folder / "config.json").write_text(f'{text[:start]}"resized_from": {size}{text[end:]}')
    for dense in (False, True):
        with pytest.raises(CheckpointError, match="configuration is not valid"):
            checkpoint.load_as(folder, Reading(), dense=dense)


def test_it_is_exported_as_any_other(tmp_path: Path) -> None:
    written = export(resize(build("vim, class token middle", depth=1), 32), tmp_path / "model.pt2", target="pt2")
    assert written.tolerance == 1e-4 and written.error <= 1e-4
