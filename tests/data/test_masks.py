"""Datasets of images and masks: layouts, what values mean, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli.data import batches, open_dataset
from ssmprune_cli.data.datasets import ImageDataset, Subset
from ssmprune_cli.data.masks import MaskedImages
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import Frame, KeepRatio


def put(root: Path, images: str, masks: str, values: dict[str, int], size: tuple[int, int] = (8, 6)) -> None:
    """A grey image and a mask of one value for each name."""
    for folder, suffix in ((images, "jpg"), (masks, "png")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, value in values.items():
            (root / folder / name).parent.mkdir(exist_ok=True)
            Image.new("L", size, value).save(root / folder / f"{name}.{suffix}")


def listed(dataset: ImageDataset) -> list[tuple[str, int]]:
    """Names, and the only value of each mask."""
    found = []
    for index in range(len(dataset)):
        mask = dataset.target(index)
        assert isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.shape == (6, 8)
        (value,) = set(mask.ravel().tolist())
        found.append((dataset.name(index), value))
    return found


@pytest.mark.parametrize("folder", ["masks", "labels", "annotations"])
def test_a_pair_of_folders(folder: str, tmp_path: Path) -> None:
    put(tmp_path, "images", folder, {"b": 3, "a": 0, "c": 255})
    (tmp_path / folder / "colours.json").touch()
    dataset = open_dataset("segfolder", tmp_path)
    assert listed(dataset) == [("images/a.jpg", 0), ("images/b.jpg", 3), ("images/c.jpg", 255)]
    assert (dataset.num_classes, dataset.class_names, dataset.notes, dataset.has_targets) == (None, (), (), True)
    (tmp_path / "images" / "d.heic").touch()
    (note,) = open_dataset("segfolder", tmp_path).notes
    assert note.endswith("images: files that are not read as images were left out: 1 .heic.")
    assert dataset.mark(0) != dataset.mark(1) and Subset(dataset, [1]).mark(0) == dataset.mark(1)


def test_folders_divided_inside_and_around(tmp_path: Path) -> None:
    put(tmp_path / "inside", "images/train", "masks/train", {"a": 1})
    put(tmp_path / "inside", "images/test", "masks/test", {"b": 2})
    put(tmp_path / "around", "train/images", "train/labels", {"a": 1})
    put(tmp_path / "around", "val/images", "val/labels", {"b": 2, "deep/c": 4})
    assert listed(open_dataset("segfolder", tmp_path / "inside")) == [("images/test/b.jpg", 2)]
    assert listed(open_dataset("segfolder", tmp_path / "inside", split="train")) == [("images/train/a.jpg", 1)]
    part = open_dataset("segfolder", tmp_path / "inside" / "images" / "train")
    assert listed(part) == [("images/train/a.jpg", 1)]
    assert listed(open_dataset("segfolder", tmp_path / "around")) == [("images/b.jpg", 2), ("images/deep/c.jpg", 4)]
    assert len(open_dataset("segfolder", tmp_path / "around", split="train")) == 1
    with pytest.raises(DataError, match="is divided into train, and has no val"):
        open_dataset("segfolder", _only_train(tmp_path / "other"))


def _only_train(root: Path) -> Path:
    put(root, "images/train", "masks/train", {"a": 1})
    return root


@pytest.mark.parametrize("place", ["beside", "around"])
def test_names_of_classes_and_what_is_none(place: str, tmp_path: Path) -> None:
    """As CamVid has it: 11 classes and a last value that is not judged. A value in between keeps its number."""
    root = tmp_path if place == "beside" else tmp_path / "val"
    put(root, "images", "masks", {"a": 1, "b": 2, "c": 3, "d": 255})
    (tmp_path / "classes.txt").write_text("sky\nvoid\nroad\nUnlabelled\n", encoding="utf-8")
    dataset = open_dataset("segfolder", root)
    assert [value for _, value in listed(dataset)] == [255, 2, 255, 255]
    assert dataset.class_names == ("sky", "void", "road") and dataset.num_classes == 3
    assert dataset.notes == (f"{tmp_path / 'classes.txt'}: pixels of void (1), Unlabelled (3) are not judged.",)


def test_ade20k(tmp_path: Path) -> None:
    root = tmp_path / "ADEChallengeData2016"
    put(root, "images/validation", "annotations/validation", {"ADE_val_00000002": 0, "ADE_val_00000001": 150})
    put(root, "images/training", "annotations/training", {"ADE_train_00000001": 1})
    dataset = open_dataset("ade20k", tmp_path)
    assert listed(dataset) == [
        ("images/validation/ADE_val_00000001.jpg", 149),
        ("images/validation/ADE_val_00000002.jpg", 255),
    ]
    assert dataset.num_classes == 150 and dataset.class_names == ()
    assert listed(open_dataset("ade20k", root, split="train")) == [("images/training/ADE_train_00000001.jpg", 0)]
    rows = [f"{1 + index}\t0.1\t10\t10\t1\tname{index}, other name" for index in range(150)]
    (root / "objectInfo150.txt").write_text("\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]) + "\n")
    assert open_dataset("ade20k", tmp_path).class_names[:2] == ("name0", "name1")
    (root / "objectInfo150.txt").write_text("\n".join(rows) + "\n")
    with pytest.raises(DataError, match=r"objectInfo150\.txt: does not list the 150 classes"):
        open_dataset("ade20k", tmp_path)
    with pytest.raises(DataError, match=r"has no images/validation\n.*--dataset segfolder"):
        open_dataset("ade20k", root / "images")


def test_a_mask_may_have_a_palette_or_one_bit_or_sixteen(tmp_path: Path) -> None:
    put(tmp_path, "images", "masks", {"bits": 1, "palette": 0, "wide": 0})
    palette = Image.new("P", (8, 6), 5)
    palette.putpalette([250, 1, 2] * 256)
    palette.save(tmp_path / "masks" / "palette.png")
    Image.new("1", (8, 6), 1).save(tmp_path / "masks" / "bits.png")
    Image.fromarray(np.full((6, 8), 7, np.uint16)).save(tmp_path / "masks" / "wide.png")
    assert [value for _, value in listed(open_dataset("segfolder", tmp_path))] == [1, 5, 7]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda root: Image.new("RGB", (8, 6)).save(root / "masks" / "a.png"),
            r"a\.png: is no mask, but a picture in RGB",
        ),
        (lambda root: (root / "masks" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n"), r"masks/a\.png: cannot be read"),
        (
            lambda root: Image.fromarray(np.full((6, 8), 300, np.uint16)).save(root / "masks" / "a.png"),
            r"a\.png: has values from 300 to 300, beyond 8 bits",
        ),
        (lambda root: Image.new("L", (8, 6)).save(root / "masks" / "a.png", format="JPEG"), r"is a mask in JPEG"),
    ],
)
def test_a_mask_that_is_none_is_named_when_it_is_due(break_it: object, message: str, tmp_path: Path) -> None:
    put(tmp_path, "images", "masks", {"a": 1, "b": 1})
    assert callable(break_it)
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        list(batches(open_dataset("segfolder", tmp_path), KeepRatio(8, 6), 2))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "masks" / "a.png").unlink(), r"images: 1 of 2 images have no mask of the same name: a\n"),
        (lambda root: (root / "images" / "b.jpg").unlink(), r"masks: 1 of 2 masks have no image of the same name: b\n"),
        (lambda root: [each.unlink() for each in (root / "masks").iterdir()], "masks: has no images"),
        (lambda root: [each.unlink() for each in (root / "images").iterdir()], "images: has no images"),
        (lambda root: (root / "masks").rename(root / "truth"), "has no images/ beside masks/, labels/ or annotations/"),
        (lambda root: (root / "labels").mkdir(), "has masks/ and labels/: which are the masks"),
        (lambda root: Image.new("L", (8, 6)).save(root / "images" / "a.png"), "a.jpg and a.png have the same name"),
        (lambda root: (root / "classes.txt").write_text("sky\nroad\nsky\n"), "classes.txt: names 'sky' twice"),
        (lambda root: (root / "classes.txt").write_text("sky\n\nroad\n"), "classes.txt: has an empty line"),
        (lambda root: (root / "classes.txt").write_text("\n"), "classes.txt: names no class"),
        (
            lambda root: (root / "classes.txt").write_text("\n".join(map(str, range(256))) + "\nvoid\n"),
            "classes.txt: names 257 classes, more than a mask of 8 bits has",
        ),
        (lambda root: put(root, "images/val", "elsewhere", {"a": 1}), "masks/val: does not exist"),
    ],
)
def test_what_does_not_fit_is_named_when_the_folder_is_opened(break_it: object, message: str, tmp_path: Path) -> None:
    put(tmp_path, "images", "masks", {"a": 1, "b": 1})
    assert callable(break_it)
    break_it(tmp_path)
    with pytest.raises(DataError, match=message):
        open_dataset("segfolder", tmp_path)


def test_images_of_equal_prepared_size_share_a_batch(tmp_path: Path) -> None:
    """Sizes a a b b b a, two at a time: what is equal only later waits for its turn."""
    sizes = {"0": (8, 6), "1": (16, 12), "2": (6, 8), "3": (12, 16), "4": (24, 32), "5": (8, 6)}
    for name, size in sizes.items():
        put(tmp_path, "images", "masks", {name: int(name)}, size)
    dataset = open_dataset("segfolder", tmp_path)
    assert isinstance(dataset, MaskedImages)
    found = list(batches(dataset, KeepRatio(8, 6), 2))
    assert [tuple(each.images.shape) for each in found] == [
        (2, 3, 6, 8),
        (2, 3, 8, 6),
        (1, 3, 8, 6),
        (1, 3, 6, 8),
    ]
    assert [name for each in found for name in each.names] == [f"images/{name}.jpg" for name in sizes]
    assert found[0].frames == (Frame((6, 8), (6, 8)), Frame((12, 16), (6, 8)))
    masks = [mask for each in found for mask in each.targets if isinstance(mask, np.ndarray)]
    assert [int(mask[0, 0]) for mask in masks] == list(range(6))
    assert [mask.shape for mask in masks] == [size[::-1] for size in sizes.values()]
