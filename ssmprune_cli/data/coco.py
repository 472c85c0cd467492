"""COCO: images with boxes and outlines of objects, in the layout that cocodataset.org publishes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ssmprune_cli.data.datasets import ImageFiles, Split
from ssmprune_cli.data.files import check_folder, entries, find_images
from ssmprune_cli.errors import DataError, listing, shown
from ssmprune_cli.files import read_bytes

_MOST_BYTES = 1 << 30  # of the annotations: those of COCO's 118,000 training images have half of it
_LAYOUT = (
    "Expected annotations/instances_{split}2017.json, and the images in {split}2017/ or images/, as cocodataset.org "
    "publishes them."
)
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """One object. `label` is the number of its category in ascending order of ids, from 0 on.

    box      left, top, width and height in pixels
    area     of the object, in pixels
    crowd    whether it is a group that nobody has divided: what lies in it is judged neither way
    outline  as the file has it: polygons, or a run-length encoding; None if it has none
    """

    label: int
    box: Box
    area: float
    crowd: bool
    outline: Any | None


@dataclass(frozen=True)
class Objects:
    """The target of one image. `categories` are the ids of all labels, in order; `size` is height and width."""

    image: int
    size: tuple[int, int]
    categories: tuple[int, ...]
    annotations: tuple[Annotation, ...]


class CocoImages(ImageFiles):
    """Image files below `root`, and the objects in each."""

    def __init__(
        self, root: Path, files: Sequence[Path], objects: Sequence[Objects], names: Iterable[str], notes: Iterable[str]
    ) -> None:
        super().__init__(root, files, None, names, notes)
        self._objects = objects

    def target(self, index: int) -> Objects:
        return self._objects[index]

    @property
    def has_targets(self) -> bool:
        return True


def open_coco(root: Path, split: Split) -> CocoImages:
    """The images that `root`/annotations/instances_<split>*.json lists, those without objects too.

    They lie in the folder of the list's name (val2017 for instances_val2017.json), in images/<name> or in images/, by
    their `file_name`. Raises DataError for another layout, a list that contradicts itself, and an image without a file.
    """
    check_folder(root)
    path = _list(root, split)
    content = _read(path)
    labels = _categories(content, path)
    objects = _objects(content, labels, path)
    folder, files = _files(root, path, [each["file_name"] for each in content["images"]])
    others = len(find_images(folder).files) - len(set(files))
    notes = [f"{folder}: images in no list are left out: {others:,}."] if others > 0 else []
    return CocoImages(folder, files, objects, labels.values(), notes)


def _list(root: Path, split: Split) -> Path:
    folder, hint = root / "annotations", _LAYOUT.format(split=split)
    if not folder.is_dir():
        raise DataError("has no folder annotations", where=str(root), hint=hint)
    found = [each for each in entries(folder) if each.name.startswith(f"instances_{split}") and each.suffix == ".json"]
    if not found:
        raise DataError(f"has no instances_{split}*.json", where=str(folder), hint=hint)
    if len(found) > 1:
        raise DataError(
            f"has several lists of the {split} images: {listing(each.name for each in found)}",
            where=str(folder),
            hint="Leave the one that is meant there.",
        )
    return found[0]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content: Any = json.loads(read_bytes(path, _MOST_BYTES, DataError))
    except (ValueError, RecursionError) as error:
        raise DataError(f"is no JSON: {shown(str(error))}", where=str(path)) from error
    missing = [
        name
        for name in ("images", "annotations", "categories")
        if not isinstance(content, dict) or not isinstance(content.get(name), list)
    ]
    if missing:
        raise DataError(f"is no list of COCO: it has no {listing(missing)}", where=str(path))
    for kind in ("images", "annotations", "categories"):
        for number, each in enumerate(content[kind]):
            if not isinstance(each, dict):
                raise _fault(path, kind, number, "is no JSON object")
    if not content["images"]:
        raise DataError("lists no images", where=str(path))
    lists: Mapping[str, Any] = content
    return lists


def _categories(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names by id, in ascending order."""
    found: dict[int, str] = {}
    for number, each in enumerate(content["categories"]):
        key, name = each.get("id"), each.get("name")
        if type(key) is not int or not isinstance(name, str) or key in found:
            raise _fault(path, "categories", number, "has no id of its own, or no name")
        found[key] = name
    return dict(sorted(found.items()))


def _objects(content: Mapping[str, Any], labels: Mapping[int, str], path: Path) -> list[Objects]:
    """Of every image, in the order of the list."""
    by_category = {key: label for label, key in enumerate(labels)}
    inside: dict[int, list[Annotation]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    for number, each in enumerate(content["images"]):
        key, size = each.get("id"), (each.get("height"), each.get("width"))
        if type(key) is not int or key in inside:
            raise _fault(path, "images", number, "has no id of its own")
        if not all(type(side) is int and side > 0 for side in size) or not isinstance(each.get("file_name"), str):
            raise _fault(path, "images", number, "has no file_name, height and width")
        inside[key], sizes[key] = [], size
    for number, each in enumerate(content["annotations"]):
        image, category = each.get("image_id"), each.get("category_id")
        if type(image) is not int or image not in inside:
            raise _fault(path, "annotations", number, f"is of an image that is not listed: {shown(str(image))}")
        if type(category) is not int or category not in by_category:
            raise _fault(path, "annotations", number, f"is of a category that is not listed: {shown(str(category))}")
        inside[image].append(_annotation(each, by_category[category], sizes[image], path, number))
    ids = tuple(labels)
    return [Objects(key, sizes[key], ids, tuple(annotations)) for key, annotations in inside.items()]


def _annotation(each: Mapping[str, Any], label: int, size: tuple[int, int], path: Path, number: int) -> Annotation:
    """The annotation of this number, in an image of `size`."""
    box = each.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(side) for side in box) or min(box[2:]) < 0:
        raise _fault(path, "annotations", number, "has no bbox [left, top, width, height]")
    area, crowd = each.get("area", box[2] * box[3]), each.get("iscrowd", 0)
    if not _is_number(area) or crowd not in (0, 1):
        raise _fault(path, "annotations", number, "has an area or iscrowd that are no such thing")
    outline = each.get("segmentation") or None
    if outline is not None and not _is_outline(outline, size):
        raise _fault(path, "annotations", number, "has a segmentation that is neither polygons nor an encoding")
    left, top, width, height = map(float, box)
    return Annotation(label, (left, top, width, height), float(area), bool(crowd), outline)


def _is_outline(value: object, size: tuple[int, int]) -> bool:
    """Whether these are polygons, or a run-length encoding of an image of `size`: lengths, or COCO's text of them."""
    if isinstance(value, dict):
        counts = value.get("counts")
        lengths = _lengths(counts) if isinstance(counts, str) else counts
        if value.get("size") != list(size) or not isinstance(lengths, list):
            return False
        return all(type(each) is int and each >= 0 for each in lengths) and sum(lengths) == size[0] * size[1]
    far = 2 * max(size)  # a line to a place far outside takes a step for each of its pixels

    def is_polygon(each: object) -> bool:
        """Three or more pairs of x and y."""
        if not isinstance(each, list) or len(each) < 6 or len(each) % 2:
            return False
        return all(_is_number(side) and -far <= side <= far for side in each)

    return isinstance(value, list) and all(map(is_polygon, value))


def _lengths(text: str) -> list[int]:
    """The lengths of runs in COCO's text: groups of five bits from the lowest on, and from the third length on the
    difference to the one before the last. -1 for what is no such text: C code reads it later."""
    found: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return [-1]
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << 1 << (shift - 5)  # the sign
            found.append(value + (found[-2] if len(found) > 2 else 0))
            value = shift = 0
    return found if shift == 0 else [-1]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _files(root: Path, path: Path, names: Sequence[str]) -> tuple[Path, list[Path]]:
    """The folder of the images, and the file of each name. DataError if one is missing, or lies outside of it."""
    outside = [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
    if outside:
        raise DataError(f"names files outside of the folder of images: {listing(outside)}", where=str(path))
    folder = next(_folders(root, path), root)
    files = [folder / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images that {path.name} lists are missing: {listing(missing)}",
            where=str(folder),
            hint="Put the images there, or take them out of the list.",
        )
    return folder, files


def _folders(root: Path, path: Path) -> Iterator[Path]:
    """Where the images of a list may lie, as far as there is such a folder."""
    name = path.stem.removeprefix("instances_")
    return (each for each in (root / name, root / "images" / name, root / "images") if each.is_dir())


def _fault(path: Path, kind: str, number: int, what: str) -> DataError:
    return DataError(f"{kind}[{number}] {what}", where=str(path))
