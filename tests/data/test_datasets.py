"""Every kind of dataset, in tiny trees of the real layout."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from ssmprune_cli.data import DATASETS, ImageDataset, Split, open_dataset
from ssmprune_cli.data.cifar import CIFAR10
from ssmprune_cli.data.datasets import Subset
from ssmprune_cli.data.imagenet import devkit_wnids, wnids
from ssmprune_cli.errors import DataError, UsageError

SPLITS: tuple[Split, ...] = ("train", "val")
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def write_image(path: Path, grey: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), (grey, grey, grey)).save(path)


def listed(dataset: ImageDataset) -> list[tuple[str, object]]:
    return [(dataset.name(index), dataset.target(index)) for index in range(len(dataset))]


def test_unknown_kind() -> None:
    with pytest.raises(UsageError, match="Did you mean 'imagenet'"):
        open_dataset("imagenett", Path())


@pytest.mark.parametrize("name", DATASETS.names())
def test_missing_root_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        open_dataset(name, tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["imagenet", "imagefolder", "cifar10", "cifar100"])
def test_empty_root_is_an_error(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has n"):
        open_dataset(name, tmp_path)


# npz


def test_npz(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([2, 0, 7]))
    dataset = open_dataset("npz", tmp_path / "a.npz")
    assert listed(dataset) == [("images[0]", 2), ("images[1]", 0), ("images[2]", 7)]
    assert dataset.num_classes is None
    np.testing.assert_array_equal(np.asarray(dataset.image(1)), images[1])


def test_npz_grey_without_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.full((2, 5, 4), 9, np.uint8))
    dataset = open_dataset("npz", tmp_path / "a.npz")
    assert (dataset.image(0).mode, dataset.image(0).size, dataset.target(0)) == ("L", (4, 5), None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((1, 2, 2), np.uint8)}, "no array `images`"),
        ({"images": np.zeros((1, 2, 2), np.float32)}, "`images` is float32"),
        ({"images": np.zeros((1, 3, 2, 2), np.uint8)}, r"`images` is uint8 \(1, 3, 2, 2\)"),
        ({"images": np.zeros((0, 2, 2), np.uint8)}, "no images"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": np.zeros(3, int)}, "for 2 images"),
        ({"images": np.zeros((2, 2, 2), np.uint8), "labels": np.zeros(2)}, "`labels` is float64"),
    ],
)
def test_npz_faults(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        open_dataset("npz", tmp_path / "a.npz")


def test_npz_runs_no_pickle(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="`images` holds object, not numbers"):
        open_dataset("npz", tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut short"])
def test_npz_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset("npz", tmp_path / "a.npz")


def test_npz_that_is_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 2, 2), np.uint8))
    with pytest.raises(DataError, match="single array"):
        open_dataset("npz", tmp_path / "a.npy")


# imagefolder


def test_imagefolder(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "2.png", grey=7)
    write_image(tmp_path / "dog" / "1.JPEG")
    write_image(tmp_path / "cat" / "deep" / "3.png")
    write_image(tmp_path / ".cache" / "4.png")
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    dataset = open_dataset("imagefolder", tmp_path)
    assert listed(dataset) == [("cat/deep/3.png", 0), ("dog/1.JPEG", 1), ("dog/2.png", 1)]
    assert dataset.class_names == ("cat", "dog")
    assert dataset.num_classes == 2
    assert dataset.image(2).getpixel((0, 0)) == (7, 7, 7)


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_imagefolder_takes_the_split(name: str, tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "dog" / "1.png")
    write_image(tmp_path / name / "cat" / "2.png")
    write_image(tmp_path / "notes" / "3.png")
    assert listed(open_dataset("imagefolder", tmp_path)) == [("cat/2.png", 0)]
    assert listed(open_dataset("imagefolder", tmp_path, split="train")) == [("dog/1.png", 0)]


def test_imagefolder_prefers_val_to_test(tmp_path: Path) -> None:
    for name in ("test", "val"):
        write_image(tmp_path / name / "cat" / f"{name}.png")
    assert listed(open_dataset("imagefolder", tmp_path)) == [("cat/val.png", 0)]


def test_imagefolder_with_the_other_split_only(tmp_path: Path) -> None:
    """Else the splits would be taken for classes."""
    for name in ("test", "val"):
        write_image(tmp_path / name / "cat" / "1.png")
    with pytest.raises(DataError, match="has test, val and no train"):
        open_dataset("imagefolder", tmp_path, split="train")


def test_imagefolder_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("bus", "train"):
        write_image(tmp_path / name / "1.png")
    for split in SPLITS:
        assert listed(open_dataset("imagefolder", tmp_path, split=split)) == [("bus/1.png", 0), ("train/1.png", 1)]


def test_imagefolder_without_images(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="no images in its class folders"):
        open_dataset("imagefolder", tmp_path)


def test_damaged_image_is_named(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    for name, content in (("cut.jpg", buffer.getvalue()[:800]), ("no.png", b"no image")):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / name).write_bytes(content)
    dataset = open_dataset("imagefolder", tmp_path)
    for index, name in enumerate(("cut.jpg", "no.png")):
        with pytest.raises(DataError, match=f"{name}: cannot be read as an image"):
            dataset.image(index)


@pytest.mark.parametrize("pil_warning", ["error", "ignore"])
def test_image_of_too_many_pixels_is_named(
    pil_warning: Literal["error", "ignore"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where PIL itself would only warn: above its limit, but not above twice its limit."""
    write_image(tmp_path / "a" / "large.png")  # 24 pixels
    dataset = open_dataset("imagefolder", tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    assert dataset.image(0).size == (6, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 23)
    with warnings.catch_warnings():
        warnings.simplefilter(pil_warning)
        with pytest.raises(DataError, match=r"large\.png: cannot be read.* limit of 23"):
            dataset.image(0)


def test_linked_folders_are_read_once(tmp_path: Path) -> None:
    write_image(tmp_path / "data" / "a" / "1.png")
    write_image(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data" / "a")
    (tmp_path / "data" / "b").symlink_to(tmp_path / "elsewhere")
    assert listed(open_dataset("imagefolder", tmp_path / "data")) == [("a/1.png", 0), ("b/2.png", 1)]


# imagenet


def test_wnids_are_those_of_imagenet() -> None:
    names = wnids()
    assert len(set(names)) == 1000
    assert list(names) == sorted(names)
    # Well-known indices: tench, goldfish, golden retriever, toilet tissue.
    assert [names.index(wnid) for wnid in ("n01440764", "n01443537", "n02099601", "n15075141")] == [0, 1, 207, 999]


@pytest.mark.parametrize("inside", ["val", "."])
def test_imagenet_folders(inside: str, tmp_path: Path) -> None:
    write_image(tmp_path / inside / "n02099601" / "ILSVRC2012_val_00000001.JPEG")
    write_image(tmp_path / inside / "n01443537" / "ILSVRC2012_val_00000002.JPEG")
    dataset = open_dataset("imagenet", tmp_path)
    assert [dataset.target(index) for index in range(2)] == [1, 207]
    assert dataset.name(1) == "n02099601/ILSVRC2012_val_00000001.JPEG"
    assert dataset.num_classes == 1000
    assert dataset.class_names[207] == "n02099601"


def test_imagenet_splits(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "n01443537" / "n01443537_2.JPEG")
    write_image(tmp_path / "val" / "n02099601" / "ILSVRC2012_val_00000001.JPEG")
    assert listed(open_dataset("imagenet", tmp_path, split="train")) == [("n01443537/n01443537_2.JPEG", 1)]
    assert listed(open_dataset("imagenet", tmp_path))[0][1] == 207


def test_imagenet_unknown_wnid(tmp_path: Path) -> None:
    write_image(tmp_path / "val" / "n01440764" / "a.JPEG")
    write_image(tmp_path / "val" / "n00000001" / "a.JPEG")
    with pytest.raises(DataError, match="'n00000001' is no WordNet id"):
        open_dataset("imagenet", tmp_path)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Images 1 and 3 of a flat validation set."""
    for number in (3, 1):
        write_image(tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")
    return tmp_path


@pytest.mark.parametrize("where", [".", "val"])
def test_imagenet_val_list(where: str, flat: Path) -> None:
    (flat / where / "val.txt").write_text(
        "val/ILSVRC2012_val_00000001.JPEG 999\n"
        "ILSVRC2012_val_00000002.JPEG 5\n"
        "\n"
        "ILSVRC2012_val_00000003.JPEG n01443537\n"
    )
    dataset = open_dataset("imagenet", flat)
    assert listed(dataset) == [("ILSVRC2012_val_00000001.JPEG", 999), ("ILSVRC2012_val_00000003.JPEG", 1)]


@pytest.mark.parametrize("line", ["ILSVRC2012_val_00000001.JPEG 1000", "a.JPEG n00000001", "a.JPEG", "a.JPEG -1"])
def test_imagenet_bad_line_is_named(line: str, flat: Path) -> None:
    (flat / "val.txt").write_text(f"ILSVRC2012_val_00000001.JPEG 0\n{line}\n")
    with pytest.raises(DataError, match=r"val\.txt, line 2"):
        open_dataset("imagenet", flat)


def test_imagenet_image_that_the_list_lacks(flat: Path) -> None:
    (flat / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG 0\n")
    with pytest.raises(DataError, match=r"does not list ILSVRC2012_val_00000003\.JPEG"):
        open_dataset("imagenet", flat)


def test_imagenet_without_list(flat: Path) -> None:
    with pytest.raises(DataError, match=r"no labels(.|\n)*val\.txt"):
        open_dataset("imagenet", flat)


# The first lines of the official ground truth, and what those images show by the sorted WordNet ids (Caffe's val.txt).
FIRST_IDS = (490, 361, 171, 822, 297, 482, 13, 704, 599, 164)
FIRST_CLASSES = (65, 970, 230, 809, 516, 57, 334, 415, 674, 332)


def test_imagenet_devkit_order() -> None:
    """Ids of meta.mat, as the documentation of MLDatasets.jl shows them: n02119789 is kit fox, number 1."""
    order = devkit_wnids()
    for wnid, number in (
        ("n02119789", 1),
        ("n02100735", 2),
        ("n02110185", 3),
        ("n02097474", 158),
        ("n02100877", 192),
        ("n01689811", 469),
        ("n04371774", 569),
        ("n07717410", 741),
        ("n03347037", 919),
        ("n02815834", 991),
        ("n03355925", 995),
    ):
        assert order[number - 1] == wnid


def test_imagenet_ground_truth(tmp_path: Path) -> None:
    for number in range(1, 11):
        write_image(tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG")
    (tmp_path / TRUTH).write_text("".join(f"{number}\n" for number in FIRST_IDS) + "1\n" * 49_990)
    dataset = open_dataset("imagenet", tmp_path)
    assert tuple(dataset.target(index) for index in range(10)) == FIRST_CLASSES


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1", "1001"] + ["1"] * 49_998, "line 2"),
        (["1", "0"] + ["1"] * 49_998, "line 2"),
        (["1"] * 49_999, "has 49,999 lines"),
    ],
)
def test_imagenet_ground_truth_faults(lines: list[str], message: str, flat: Path) -> None:
    (flat / TRUTH).write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        open_dataset("imagenet", flat)


# cifar10


def record(label: int, red: int, green: int, blue: int) -> bytes:
    return bytes([label]) + bytes([red]) * 1024 + bytes([green]) * 1024 + bytes([blue]) * 1024


@pytest.mark.parametrize("inside", ["cifar-10-batches-bin", "."])
def test_cifar10_binary(inside: str, tmp_path: Path) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    second = bytearray(record(3, 10, 20, 30))
    second[1 + 32 + 2] = 99  # red plane, row 1, column 2
    (tmp_path / inside / "test_batch.bin").write_bytes(record(9, 1, 2, 3) + bytes(second))
    dataset = open_dataset("cifar10", tmp_path)
    assert listed(dataset) == [("test_batch[0]", 9), ("test_batch[1]", 3)]
    assert dataset.num_classes == 10
    assert dataset.class_names[3] == "cat"
    assert dataset.image(0).size == (32, 32)
    assert dataset.image(1).getpixel((2, 1)) == (99, 20, 30)
    assert dataset.image(1).getpixel((1, 2)) == (10, 20, 30)


def test_cifar10_binary_training_set(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(record(0, 0, 0, 0))
    for number in range(1, 6):
        with pytest.raises(DataError, match=rf"data_batch_{number}\.bin: there is no such file"):
            open_dataset("cifar10", tmp_path, split="train")
        (tmp_path / f"data_batch_{number}.bin").write_bytes(record(number, 1, 2, 3) + record(0, number, 5, 6))
    dataset = open_dataset("cifar10", tmp_path, split="train")
    assert listed(dataset)[:4] == [
        ("data_batch_1[0]", 1),
        ("data_batch_1[1]", 0),
        ("data_batch_2[0]", 2),
        ("data_batch_2[1]", 0),
    ]
    assert len(dataset) == 10
    assert dataset.image(9).getpixel((0, 0)) == (5, 5, 6)


@pytest.mark.parametrize(("content", "message"), [(b"abc", "3 bytes"), (b"", "0 bytes"), (record(10, 0, 0, 0), "10")])
def test_cifar10_damaged(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(DataError, match=f"{message}.*damaged"):
        open_dataset("cifar10", tmp_path)


def test_cifar10_pickle_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"\x80\x02}")
    with pytest.raises(DataError, match=r"pickle(.|\n)*cifar-10-binary"):
        open_dataset("cifar10", tmp_path)


@pytest.mark.parametrize("inside", ["test", "val", "."])
def test_cifar10_folders(inside: str, tmp_path: Path) -> None:
    """Labels are those of CIFAR-10 even if some classes have no folder."""
    write_image(tmp_path / inside / "truck" / "1.png")
    write_image(tmp_path / inside / "bird" / "2.png")
    dataset = open_dataset("cifar10", tmp_path)
    assert listed(dataset) == [("bird/2.png", 2), ("truck/1.png", 9)]
    assert dataset.num_classes == 10


def test_cifar10_unknown_folder(tmp_path: Path) -> None:
    write_image(tmp_path / "bird" / "1.png")
    write_image(tmp_path / "lorry" / "1.png")
    with pytest.raises(DataError, match="'lorry'"):
        open_dataset("cifar10", tmp_path)


def test_cifar10_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 32, 32, 3), np.uint8), labels=np.array([4]))
    dataset = open_dataset("cifar10", tmp_path / "a.npz")
    assert dataset.class_names == CIFAR10.classes
    assert listed(dataset) == [("images[0]", 4)]


def test_subset(tmp_path: Path) -> None:
    for index, name in enumerate("abc"):
        write_image(tmp_path / name / "1.png", grey=index)
    dataset = Subset(open_dataset("imagefolder", tmp_path), [2, 0])
    assert listed(dataset) == [("c/1.png", 2), ("a/1.png", 0)]
    assert dataset.image(0).getpixel((0, 0)) == (2, 2, 2)
    assert (dataset.num_classes, dataset.class_names) == (3, ("a", "b", "c"))
