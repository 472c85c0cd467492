"""Which class an image gets where more than one order is possible, and what is said of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli.data import Joined, Subset, calibration_images, open_dataset
from ssmprune_cli.data.cifar import CIFAR100
from ssmprune_cli.errors import DataError

BOM = "\N{BYTE ORDER MARK}"


def write_image(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (grey, grey, grey)).save(path)


def one_note(kind: str, root: Path) -> str:
    notes: tuple[str, ...] = open_dataset(kind, root).notes
    (note,) = notes
    return note


# folders


def test_an_order_that_is_the_only_one_needs_no_note(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "1.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "classes.txt").write_text(f"{BOM}cat\ndog\n")
    assert open_dataset("imagefolder", tmp_path).notes == ()


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("0", "1", "10", "2"), "by number it would be 0, 1, 2, 10"),
        (("class_10", "class_9"), "by number it would be class_9, class_10"),
        (("Zebra", "ant"), "without regard to case it would be ant, Zebra"),
    ],
)
def test_another_order_of_folders_is_named(names: tuple[str, ...], order: str, tmp_path: Path) -> None:
    for name in names:
        write_image(tmp_path / name / "1.png")
    dataset = open_dataset("imagefolder", tmp_path)
    assert dataset.class_names == names
    (note,) = dataset.notes
    assert f"numbered by name: {', '.join(names)}; {order}" in note and str(tmp_path) in note
    assert Subset(dataset, [0]).notes == Joined([dataset]).notes == dataset.notes


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("classes.txt", "dog\ncat\n"),
        ("labels.txt", f"{BOM}dog\r\ncat\r\n"),
        ("class_to_idx.json", json.dumps({"cat": 1, "dog": 0})),
    ],
)
def test_a_list_in_another_order_is_named(name: str, text: str, tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        write_image(tmp_path / "val" / folder / "1.png")
    (tmp_path / name).write_bytes(text.encode())
    assert f"{tmp_path / name} has another order, which is not used" in one_note("imagefolder", tmp_path)


@pytest.mark.parametrize("text", ["[1, 2]", '{"cat": 1, "dog": "x"}', "{", "[" * 100_000, "\udcff"])
def test_a_file_that_is_no_list_of_these_classes_is_no_matter(text: str, tmp_path: Path) -> None:
    for folder in ("cat", "dog"):
        write_image(tmp_path / folder / "1.png")
    (tmp_path / "class_to_idx.json").write_text(text, errors="surrogateescape")
    assert open_dataset("imagefolder", tmp_path).notes == ()


@pytest.mark.parametrize("kind", ["imagefolder", "imagenet"])
def test_classes_without_images_and_kinds_left_out_are_named(kind: str, tmp_path: Path) -> None:
    full, phone, bare = "n01440764", "n01443537", "n02099601"
    write_image(tmp_path / full / "1.jpg")
    (tmp_path / full / "2.dng").write_bytes(b"raw")
    (tmp_path / phone).mkdir()
    for number in range(3):
        (tmp_path / phone / f"{number}.HEIC").write_bytes(b"heic")
    (tmp_path / bare).mkdir()
    empty, left_out = open_dataset(kind, tmp_path).notes
    assert f"no images of 2 classes: {phone} (only 3 .heic), {bare}" in empty
    assert "left out: 3 .heic, 1 .dng" in left_out


def test_calibration_names_what_it_leaves_out(tmp_path: Path) -> None:
    write_image(tmp_path / "1.png")
    (tmp_path / "2.heic").write_bytes(b"heic")
    (note,) = calibration_images(tmp_path, 4, 0).notes
    assert "left out: 1 .heic" in note
    (tmp_path / "1.png").unlink()
    with pytest.raises(DataError, match=r"has no images, only 1 \.heic"):
        calibration_images(tmp_path, 4, 0)


def test_jfif_is_jpeg(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (6, 4), (9, 9, 9)).save(tmp_path / "a" / "1.jfif", format="jpeg")
    dataset = open_dataset("imagefolder", tmp_path)
    assert (len(dataset), dataset.image(0).size, dataset.notes) == (1, (6, 4), ())


# ImageNet's lists


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Images 1 and 3 of a flat validation set."""
    for number in (3, 1):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path


def kaggle(*rows: str) -> str:
    return "\n".join(("ImageId,PredictionString", *rows)) + "\n"


FIRST = "ILSVRC2012_val_00000001,n01443537 85 1 499 272 n01443537 1 2 3 4 "
THIRD = "ILSVRC2012_val_00000003,n02099601 0 0 9 9"


@pytest.mark.parametrize("mark", ["", BOM])
def test_kaggle_csv(mark: str, flat: Path) -> None:
    (flat / "LOC_val_solution.csv").write_text(mark + kaggle(THIRD, FIRST), encoding="utf-8")
    dataset = open_dataset("imagenet", flat)
    assert [dataset.target(index) for index in range(2)] == [1, 207]
    assert dataset.notes == ()


def test_kaggle_archive(tmp_path: Path) -> None:
    inside = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    write_image(inside / "val" / "ILSVRC2012_val_00000003.JPEG")
    write_image(inside / "train" / "n01443537" / "n01443537_2.JPEG")
    (tmp_path / "LOC_val_solution.csv").write_text(kaggle(FIRST, THIRD))
    assert open_dataset("imagenet", tmp_path).target(0) == 207
    assert open_dataset("imagenet", tmp_path, split="train").target(0) == 1


@pytest.mark.parametrize(
    "row",
    [
        "ILSVRC2012_val_00000001,n00000001 85 1 499 272",
        "ILSVRC2012_val_00000001,n01443537 85 1 499 272 n02099601 1 2 3 4",  # two classes
        "ILSVRC2012_val_00000001,n01443537 85 1",
        "ILSVRC2012_val_00000001",
        '"ILSVRC2012_val_00000001',
    ],
)
def test_a_bad_row_of_kaggle_is_named(row: str, flat: Path) -> None:
    (flat / "LOC_val_solution.csv").write_text(kaggle(THIRD, row))
    with pytest.raises(DataError, match=r"LOC_val_solution\.csv, line 3.* is not"):
        open_dataset("imagenet", flat)


def test_lists_that_contradict_each_other_are_refused(flat: Path) -> None:
    (flat / "LOC_val_solution.csv").write_text(kaggle(FIRST, THIRD))
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000003.JPEG 207\n")
    assert open_dataset("imagenet", flat).notes == ()  # they agree, so the numbers are what they seem
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1\nILSVRC2012_val_00000003.JPEG 208\n")
    with pytest.raises(DataError, match=r"00000003 has the class 207, and .*val\.txt says 208"):
        open_dataset("imagenet", flat)


def test_a_list_that_contradicts_itself_is_refused(flat: Path) -> None:
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 1\nval/ILSVRC2012_val_00000001.JPEG 2\n")
    with pytest.raises(DataError, match=r"line 2: ILSVRC2012_val_00000001 has the class 2 here and 1 before"):
        open_dataset("imagenet", flat)


def test_numbers_of_a_list_are_said_to_be_indices(flat: Path) -> None:
    lines = "ILSVRC2012_val_00000001.JPEG {}\nILSVRC2012_val_00000003.JPEG {}\n"
    (flat / "val.txt").write_text(BOM + lines.format(5, 999), encoding="utf-8")
    assert "indices from 0 in the order of the sorted WordNet ids" in one_note("imagenet", flat)
    (flat / "val.txt").write_text(lines.format("n01443537", "n02099601"))
    assert open_dataset("imagenet", flat).notes == ()
    (flat / "val.txt").write_text(lines.format(5, 1000))  # counted from 1
    with pytest.raises(DataError, match=r"line 2(.|\n)*count from 1"):
        open_dataset("imagenet", flat)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ILSVRC2012_val_00000001.JPEG 1".encode("utf-16"), "UTF-16"),
        (b"\xff\xfe\xfd", "UTF-16"),
        (b"ILSVRC2012_val_00000001.JPEG \xe9", "no text in UTF-8"),
        (b"a.JPEG " + b"9" * 5000, "line 1"),
        ("a.JPEG \N{ARABIC-INDIC DIGIT ONE}".encode(), "line 1"),
        (b"a.JPEG \x1b[2J", r"\\x1b\[2J"),
    ],
)
def test_a_list_that_is_no_list(content: bytes, message: str, flat: Path) -> None:
    (flat / "val.txt").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_dataset("imagenet", flat)
    assert len(str(caught.value)) < 1000


# MedMNIST


def medmnist(path: Path, **changed: np.ndarray) -> Path:
    """As its archives are: grey images of three splits, labels of one column."""
    arrays: dict[str, np.ndarray] = {}
    for number, part in enumerate(("train", "val", "test")):
        arrays[f"{part}_images"] = np.full((3, 28, 28), number, np.uint8)
        arrays[f"{part}_labels"] = np.array([[0], [number], [2]], np.uint8)
    np.savez_compressed(path, **{**arrays, **changed})  # type: ignore[arg-type]
    return path


def test_medmnist(tmp_path: Path) -> None:
    path = medmnist(tmp_path / "pathmnist.npz")
    dataset = open_dataset("npz", path)
    assert [dataset.target(index) for index in range(3)] == [0, 1, 2]
    assert (dataset.name(2), dataset.image(2).getpixel((0, 0))) == ("val_images[2]", 1)
    (note,) = dataset.notes
    assert "of test_images, train_images, val_images, `val_images` is read" in note
    assert open_dataset("npz", path, split="train").image(0).getpixel((0, 0)) == 0
    assert len(calibration_images(medmnist(path, train_images=np.eye(3, dtype=np.uint8)[:, None]), 9, 0)) == 3


def test_medmnist_in_colour_and_with_one_channel(tmp_path: Path) -> None:
    colour = medmnist(tmp_path / "a.npz", val_images=np.zeros((3, 28, 28, 3), np.uint8))
    assert open_dataset("npz", colour).image(0).mode == "RGB"
    grey = medmnist(tmp_path / "b.npz", val_images=np.zeros((3, 28, 28, 1), np.uint8))
    assert open_dataset("npz", grey).image(0).mode == "L"


def test_several_labels_an_image_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"uint8 \(3, 14\) for 3 images: several labels an image"):
        open_dataset("npz", medmnist(tmp_path / "chestmnist.npz", val_labels=np.zeros((3, 14), np.uint8)))


def test_labels_beyond_any_class_are_refused(tmp_path: Path) -> None:
    labels = np.array([1, 2, 2**63 + 5], np.uint64)
    with pytest.raises(DataError, match="9223372036854775813, which is no class"):
        open_dataset("npz", medmnist(tmp_path / "a.npz", val_labels=labels))


# CIFAR-100


def record(coarse: int, fine: int) -> bytes:
    return bytes([coarse, fine]) + bytes([7]) * 1024 + bytes([8]) * 1024 + bytes([9]) * 1024


@pytest.mark.parametrize("inside", ["cifar-100-binary", "."])
def test_cifar100_binary_has_fine_labels(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    (tmp_path / inside / "test.bin").write_bytes(record(3, 99) + record(4, 0))
    (tmp_path / inside / "train.bin").write_bytes(record(1, 50))
    (tmp_path / inside / "fine_label_names.txt").write_text("\n".join(CIFAR100.classes) + "\n\n")
    dataset = open_dataset("cifar100", tmp_path)
    assert [dataset.target(index) for index in range(2)] == [99, 0]
    assert dataset.image(1).getpixel((31, 31)) == (7, 8, 9)
    assert (dataset.num_classes, dataset.class_names[99], dataset.name(1)) == (100, "worm", "test[1]")
    assert open_dataset("cifar100", tmp_path, split="train").target(0) == 50


def test_cifar100_classes_are_the_alphabet() -> None:
    assert len(CIFAR100.classes) == 100 and list(CIFAR100.classes) == sorted(CIFAR100.classes)


def test_a_class_list_that_contradicts_cifar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test.bin").write_bytes(record(0, 0))
    names = list(CIFAR100.classes)
    names[1], names[2] = names[2], names[1]
    (tmp_path / "fine_label_names.txt").write_text("\n".join(names))
    with pytest.raises(DataError, match=r"fine_label_names\.txt.*differs from line 2 on"):
        open_dataset("cifar100", tmp_path)


def test_cifar100_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"\x80\x02}")
    with pytest.raises(DataError, match=r"Python version of CIFAR-100, a pickle(.|\n)*cifar-100-binary"):
        open_dataset("cifar100", tmp_path)
