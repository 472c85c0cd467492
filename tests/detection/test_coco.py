"""The dataset kind coco: its real layout, and what is wrong with one, said by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.data import Annotation, Objects, Subset, open_dataset
from ssmprune_cli.data.coco import _lengths
from ssmprune_cli.errors import DataError
from ssmprune_cli.tasks.average_precision import coco_tools
from tests.detection.conftest import write_coco


def content(root: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((root / "annotations" / "instances_val2017.json").read_text(encoding="utf-8"))
    return values


def put(root: Path, values: object, name: str = "instances_val2017.json") -> None:
    (root / "annotations" / name).write_text(json.dumps(values), encoding="utf-8")


def test_the_layout_of_coco(tmp_path: Path) -> None:
    root = write_coco(tmp_path, images=3)
    data = open_dataset("coco", root)
    assert len(data) == 3 and data.class_names == ("cat", "dog", "tree") and data.has_targets
    assert data.name(0) == "000000000001.png" and data.image(0).size == (60, 40)
    target = data.target(0)
    assert isinstance(target, Objects)
    assert (target.image, target.size, target.categories) == (1, (40, 60), (2, 5, 9))
    assert target.annotations[0] == Annotation(0, (4.0, 6.0, 20.0, 10.0), 200.0, False, [[4, 6, 24, 6, 24, 16, 4, 16]])
    assert Subset(data, [2]).target(0) == data.target(2)
    assert len({data.mark(index) for index in range(3)}) == 3


def test_categories_are_numbered_by_their_ids(tmp_path: Path) -> None:
    """Whatever their order in the file is."""
    root = write_coco(tmp_path)
    values = content(root)
    values["categories"].reverse()
    put(root, values)
    assert open_dataset("coco", root).class_names == ("cat", "dog", "tree")


def test_an_image_without_objects_counts(tmp_path: Path) -> None:
    root = write_coco(tmp_path, images=3)
    values = content(root)
    values["annotations"] = [each for each in values["annotations"] if each["image_id"] != 2]
    put(root, values)
    target = open_dataset("coco", root).target(1)
    assert isinstance(target, Objects) and target.annotations == ()


def test_images_that_no_list_names_are_left_out_aloud(tmp_path: Path) -> None:
    root = write_coco(tmp_path, images=3)
    values = content(root)
    values["images"] = [each for each in values["images"] if each["id"] != 2]
    values["annotations"] = [each for each in values["annotations"] if each["image_id"] != 2]
    put(root, values)
    data = open_dataset("coco", root)
    assert len(data) == 2 and data.notes == (f"{root / 'val2017'}: images in no list are left out: 1.",)


@pytest.mark.parametrize("folder", ["images/val2017", "images"])
def test_images_may_lie_elsewhere(tmp_path: Path, folder: str) -> None:
    root = write_coco(tmp_path)
    (root / folder).parent.mkdir(exist_ok=True)
    (root / "val2017").rename(root / folder)
    assert open_dataset("coco", root).image(0).size == (60, 40)


@given(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=12))
def test_cocos_text_of_lengths_is_read(lengths: list[int]) -> None:
    """As pycocotools writes it."""
    _, _, encoding = coco_tools()
    size = [1, sum(lengths)]
    text = encoding.frPyObjects({"size": size, "counts": lengths}, *size)["counts"].decode()
    assert _lengths(text) == lengths


@pytest.mark.parametrize("text", ["P" * 9, "0P", "é", "0 1"])
def test_damaged_texts_of_lengths_are_none(text: str) -> None:
    assert _lengths(text) == [-1]


def test_splits_have_lists_of_their_own(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    with pytest.raises(DataError, match=r"has no instances_train\*\.json"):
        open_dataset("coco", root, split="train")
    put(root, content(root), "instances_train2017.json")
    (root / "val2017").rename(root / "train2017")
    assert len(open_dataset("coco", root, split="train")) == 2
    with pytest.raises(DataError, match=r"2 of 2 images that instances_val2017\.json lists are missing"):
        open_dataset("coco", root)


def test_what_is_no_layout_of_coco(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_dataset("coco", tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no folder annotations"):
        open_dataset("coco", tmp_path)
    root = write_coco(tmp_path / "data")
    put(root, content(root), "instances_val2014.json")
    with pytest.raises(DataError, match=r"several lists of the val images: instances_val2014\.json, instances_val2017"):
        open_dataset("coco", root)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("images", {"file_name": "gone.png"}, r"1 of 2 images .* missing: gone\.png"),
        ("images", {"file_name": "../secret.png"}, r"outside of the folder of images: \.\./secret"),
        ("images", {"file_name": "/etc/passwd"}, "outside of the folder of images"),
        ("images", {"id": 2}, r"images\[1\] has no id of its own"),
        ("images", {"width": 0}, r"images\[0\] has no file_name, height and width"),
        ("annotations", {"image_id": 77}, r"annotations\[0\] is of an image that is not listed: 77"),
        ("annotations", {"category_id": 1}, r"annotations\[0\] is of a category that is not listed: 1"),
        ("annotations", {"bbox": [1, 2, 3]}, r"annotations\[0\] has no bbox"),
        ("annotations", {"bbox": [1, 2, -3, 4]}, r"annotations\[0\] has no bbox"),
        ("annotations", {"bbox": [1, 2, float("nan"), 4]}, r"annotations\[0\] has no bbox"),
        ("annotations", {"iscrowd": 3}, r"annotations\[0\] has an area or iscrowd"),
        ("annotations", {"segmentation": "mask"}, r"annotations\[0\] has a segmentation"),
        ("annotations", {"segmentation": [[1, 2, 3, 4]]}, r"annotations\[0\] has a segmentation"),
        ("annotations", {"segmentation": [[1, 2, 3, 4, 5, 1e9]]}, r"annotations\[0\] has a segmentation"),
        ("annotations", {"segmentation": [[1, 2, 3, 4, 5, "6"]]}, r"annotations\[0\] has a segmentation"),
        ("annotations", {"segmentation": {"size": [40, 60], "counts": [7]}}, r"annotations\[0\] has a segmentation"),
        ("annotations", {"segmentation": {"size": [60, 40], "counts": [2400]}}, r"annotations\[0\] has a segmentation"),
        ("categories", {"id": 5}, r"categories\[1\] has no id of its own"),
    ],
)
def test_a_list_that_is_wrong_says_where(tmp_path: Path, kind: str, change: dict[str, Any], message: str) -> None:
    root = write_coco(tmp_path)
    values = content(root)
    values[kind][0].update(change)
    put(root, values)
    with pytest.raises(DataError, match=message):
        open_dataset("coco", root)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no list of COCO: it has no images, annotations, categories"),
        ({"images": [], "annotations": [], "categories": {}}, "it has no categories"),
        ({"images": [], "annotations": [], "categories": []}, "lists no images"),
        ({"images": [3], "annotations": [], "categories": []}, r"images\[0\] is no JSON object"),
    ],
)
def test_other_json_is_no_list(tmp_path: Path, values: object, message: str) -> None:
    root = write_coco(tmp_path)
    put(root, values)
    with pytest.raises(DataError, match=message):
        open_dataset("coco", root)


def test_a_damaged_list_is_no_json(tmp_path: Path) -> None:
    root = write_coco(tmp_path)
    (root / "annotations" / "instances_val2017.json").write_text('{"images": [', encoding="utf-8")
    with pytest.raises(DataError, match="is no JSON"):
        open_dataset("coco", root)
