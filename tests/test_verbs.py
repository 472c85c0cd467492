"""`ssmprune_cli.compress` and `repair` with images on the disk."""

from __future__ import annotations

import inspect
import sys
import typing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import ssmprune_cli
from ssmprune_cli import adapt, pruning
from ssmprune_cli.data import some_images
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.workflows.finetune import build

SETTINGS = ["image_size=[16,16]", "patch_size=4", "stride=4", "embed_dim=16", "depth=4", "num_classes=2"]


@pytest.fixture(scope="module")
def model() -> Backbone:
    return build("vim", SETTINGS, name="vim_midclstok_div2", seed=0).eval()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for index in range(6):
        place = folder / f"class{index % 2}"
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(place / f"{index}.png")
    return folder


def deltas(model: Backbone, calibration: Any, **options: Any) -> list[Tensor]:
    seen = ssmprune_cli.compress(model, 0.5, calibration=calibration, **options)
    assert seen is not None and seen.images == 6
    return [delta for delta in seen.deltas if delta is not None]


def test_a_folder_a_list_and_an_archive_calibrate_as_their_pixels_do(
    model: Backbone, photos: Path, tmp_path: Path
) -> None:
    files = sorted(photos.rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    np.savez(tmp_path / "images.npz", images=pixels)
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)) + "\n\n")
    expected = deltas(model, files)
    forms = (photos, str(photos), list(map(str, files)), tmp_path / "images.npz", tmp_path / "list.txt")
    for calibration in forms:
        found = deltas(model, calibration)
        # Sums of doubles in another order.
        assert len(found) == len(expected) > 0
        assert all(torch.allclose(one, other, rtol=1e-10) for one, other in zip(found, expected, strict=True))
    # Pillow resizes the files, torch the array: a grey level apart.
    close = deltas(model, pixels)
    assert all(torch.allclose(one, other, rtol=1e-2) for one, other in zip(close, expected, strict=True))


def test_a_folder_is_not_read_class_by_class(model: Backbone, photos: Path) -> None:
    from ssmprune_cli.workflows.verbs import from_files

    (first,), (again,), (other,) = (from_files(model, photos, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    (listed,) = from_files(model, sorted(photos.rglob("*.png")))
    assert sorted(map(float, first.sum(dim=(1, 2, 3)))) == pytest.approx(sorted(map(float, listed.sum(dim=(1, 2, 3)))))


def test_repair_reads_files_too(model: Backbone, photos: Path) -> None:
    ssmprune_cli.compress(model, 0.5)
    found = ssmprune_cli.repair(model, photos)
    assert found.images == 6 or found.kind == "none"
    assert isinstance(model.pruner, TokenPruner)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is new in Python 3.11")
def test_the_signatures_are_those_of_the_verbs() -> None:
    assert inspect.signature(ssmprune_cli.repair) == inspect.signature(pruning.repair)
    assert ssmprune_cli.repair.__doc__ == pruning.repair.__doc__
    ours, own = (inspect.signature(each).parameters for each in typing.get_overloads(ssmprune_cli.compress))
    below = {each.name: each.default for each in inspect.signature(pruning.compress).parameters.values()}
    assert {each.name: each.default for each in ours.values()} == below | {"weights": "float"}
    assert set(own) == set(inspect.signature(adapt.compress).parameters)


def test_options_of_the_other_kind_of_model_are_refused(model: Backbone) -> None:
    with pytest.raises(UsageError, match="`protect` is for modules of your own, and the model is a Vim"):
        ssmprune_cli.compress(model, 0.5, protect=[0])  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="`repair` is for backbones of ours, and the model is a Linear"):
        ssmprune_cli.compress(torch.nn.Linear(2, 2), 0.5, repair="auto")  # type: ignore[call-overload]
    with pytest.raises(UsageError, match="`weights` is for backbones of ours, and the model is a Linear"):
        ssmprune_cli.compress(torch.nn.Linear(2, 2), weights="int8")  # type: ignore[call-overload]


def test_what_is_neither_compressed_nor_accelerated_is_not_restored() -> None:
    with pytest.raises(UsageError, match="nothing of this Linear is compressed or accelerated"):
        ssmprune_cli.restore(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ("no such folder", DataError, "no such folder: does not exist"),
        (["no such.png"], DataError, r"no such\.png: there is no such file"),
        (["a.png", 3], UsageError, "a list of files holds a value of type int"),
    ],
)
def test_what_is_not_there_is_named(model: Backbone, calibration: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        ssmprune_cli.compress(model, 0.5, calibration=calibration)


def test_logits_in_an_order_are_not_for_a_folder_that_has_none(model: Backbone, photos: Path) -> None:
    with pytest.raises(UsageError, match="those of a folder are in none"):
        ssmprune_cli.compress(model, 0.5, calibration=photos, dense=torch.zeros(6, 2), repair="none")


def test_notes_about_a_folder_are_warnings(model: Backbone, photos: Path, tmp_path: Path) -> None:
    for file in photos.rglob("*.png"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "notes.doc").write_text("x")
    with pytest.warns(UserWarning, match=r"were left out: 1 \.doc"):
        deltas(model, tmp_path)


def test_a_list_names_files_from_its_own_folder(photos: Path, tmp_path: Path) -> None:
    (photos / "list.txt").write_text("class0/0.png\nclass1/1.png\n")
    images = some_images(photos / "list.txt", 9, 0)
    (photos / "list.txt").unlink()
    assert [images.name(index) for index in range(len(images))] == ["class0/0.png", "class1/1.png"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="lists no images"):
        some_images(tmp_path / "empty.txt", 9, 0)
