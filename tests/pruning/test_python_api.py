"""`compress` as Python users call it: what they have for images, and what they pass by mistake."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ssmprune_cli
from ssmprune_cli.data.preprocess import preprocess
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.pruning import ALIGNMENTS, TokenPruner, compress, restore
from ssmprune_cli.pruning.images import as_batches
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.registry import Registry
from ssmprune_cli.workflows.finetune import build

SETTINGS = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]


@pytest.fixture(scope="module")
def model() -> Backbone:
    return build("vim", SETTINGS, name="vim_midclstok_div2", seed=0).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def deltas(model: Backbone, calibration: Any, **options: Any) -> list[Tensor]:
    """What calibration learned."""
    seen = compress(model, 0.5, calibration=calibration, **options)
    assert seen is not None and seen.images == 6
    return [delta for delta in seen.deltas if delta is not None]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) > 0 and all(map(torch.equal, found, expected))


def test_every_form_of_the_same_images_calibrates_the_same(model: Backbone, images: Tensor) -> None:
    expected = deltas(model, list(images.split(2)))
    labels = torch.zeros(6)
    assert same(deltas(model, DataLoader(TensorDataset(images, labels), batch_size=2)), expected)
    assert same(deltas(model, DataLoader(TensorDataset(images), batch_size=2)), expected)  # lists of one tensor
    assert same(deltas(model, ((part, None) for part in images.split(2))), expected)
    assert same(deltas(model, [part.numpy().astype(np.float64) for part in images.split(2)]), expected)
    whole = deltas(model, images)
    assert same(deltas(model, images.numpy()), whole)


@pytest.mark.parametrize("entries", [IMPORTANCES, REDUCTIONS, ALIGNMENTS])
def test_what_a_pruned_model_holds_can_be_pickled(entries: Registry[Any]) -> None:
    """Some people save the whole module, and processes that are started anew are sent it."""
    for name, entry in entries.items():
        file = io.BytesIO()
        torch.save(entry, file)
        assert file.tell() > 0, name


def test_a_loader_serves_an_alignment_that_needs_more_than_one_pass(model: Backbone, images: Tensor) -> None:
    def batches() -> Iterator[Tensor]:
        yield from images.split(2)

    found = []
    for calibration in (batches(), list(images.split(2)), DataLoader(TensorDataset(images, images), batch_size=2)):
        compress(model, 0.5, reduction="merge", calibration=calibration)
        assert isinstance(model.pruner, TokenPruner)
        found.append({name: value.clone() for name, value in model.pruner.named_buffers()})
    assert found[0].keys() == found[1].keys() == found[2].keys() and found[0]
    assert all(torch.equal(found[0][name], each[name]) for each in found[1:] for name in found[0])


@pytest.mark.parametrize("size", [(16, 16), (40, 24), (20, 33)])
def test_uint8_images_are_prepared_the_model_s_way(model: Backbone, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size, 3), dtype=np.uint8)
    pixels[1] = np.linspace(0, 255, size[1], dtype=np.uint8)[None, :, None]  # smooth, too
    way = model.preprocessing
    assert isinstance(way, Preprocessing)
    expected = torch.stack([preprocess(Image.fromarray(each), way) for each in pixels])
    (last,) = as_batches(model, pixels)
    (first,) = as_batches(model, torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()))
    assert torch.equal(first, last) and first.shape == (3, 3, 16, 16)
    # torch and Pillow round a resized pixel alike but for one step of 255.
    assert float((first - expected).abs().max()) <= 1.01 / 255 / min(way.std)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ("photos/", "type str holds no calibration images"),
        (3, "type int holds no calibration images"),
        ({"images": torch.zeros(1, 3, 16, 16)}, "type dict holds no"),
        (["a.jpg"], "calibration images are of type str"),
        (torch.zeros(3, 16, 16), r"float32 \(3, 16, 16\)"),
        (torch.zeros(2, 16, 16, 3), r"float32 \(2, 16, 16, 3\)"),
        (torch.zeros(2, 3, 8, 8), "have 8x8 pixels, and the model takes 16x16"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.int64), "neither floats nor uint8"),
        (torch.full((2, 3, 16, 16), 255.0), "reach 255, so they are not normalised"),
    ],
)
def test_what_is_no_images_is_named_with_what_is_wanted(model: Backbone, calibration: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"{message}(.|\n)*Give images \(B, 3, H, W\)"):
        compress(model, 0.5, calibration=calibration)


def test_images_that_are_not_finite_are_refused(model: Backbone) -> None:
    with pytest.raises(DataError, match="not finite"):
        compress(model, 0.5, calibration=torch.full((2, 3, 16, 16), torch.nan))


@pytest.mark.parametrize("verb", [compress, restore])
def test_a_plain_module_is_told_what_is_needed(verb: Any) -> None:
    with pytest.raises(UsageError, match=r"a Linear has no place to drop tokens at(.|\n)*ssmprune_cli\.load"):
        verb(nn.Linear(2, 2))


def test_results_are_short_to_print(model: Backbone, images: Tensor) -> None:
    assert len(repr(compress(model, 0.5, calibration=images))) < 500


def test_dir_shows_the_api() -> None:
    assert dir(ssmprune_cli) == sorted(ssmprune_cli.__all__)
    assert {"compress", "load", "restore"} <= set(dir(ssmprune_cli))
