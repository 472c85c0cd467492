"""Average precision as COCO defines it, by pycocotools; and how far it varies with the images that happen to be there.

Letters: N draws of the bootstrap, I images, D detections of a category, T thresholds of the overlap, P of the
detections that are right.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ssmprune_cli.data import Objects
from ssmprune_cli.errors import UsageError
from ssmprune_cli.report import AveragePrecision

Kind = Literal["bbox", "segm"]
Floats = NDArray[np.float64]
_RECALLS = np.linspace(0.0, 1.0, 101)  # at which precision is read
_MOST = 100  # detections of an image that count
_DRAWS = (200, 1000)  # of the bootstrap: as many as `_WORK` allows, between these
_WORK = 1 << 28
_AT_ONCE = 1 << 22  # numbers


@dataclass(frozen=True)
class Found:
    """What a model found in one image, best first: plain values.

    boxes   left, top, width and height in pixels
    labels  numbers of categories, from 0 on
    masks   COCO's run-length encoding of each, for the size of the image; as text
    """

    boxes: tuple[tuple[float, ...], ...]
    scores: tuple[float, ...]
    labels: tuple[int, ...]
    masks: tuple[str, ...]


@dataclass(frozen=True)
class _Category:
    """One category in all images, detections by falling score.

    image    (D,) in which each was found
    right    (T, D) whether it is an object that no better detection is
    counts   (T, D) whether it is judged at all
    objects  (I,) how many there are
    """

    image: NDArray[np.int64]
    right: NDArray[np.bool_]
    counts: NDArray[np.bool_]
    objects: Floats


def coco_tools() -> tuple[Any, Any, Any]:
    """pycocotools: its COCO, COCOeval and mask. UsageError where it is not installed."""
    try:
        from pycocotools import mask
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise UsageError(
            "average precision is computed by pycocotools, which is not installed",
            hint="Type `pip install 'ssmprune[coco]'`.",
        ) from error
    return COCO, COCOeval, mask


class Judgement:
    """What one model found in all images, `found` in the order of `targets`, matched with what is there."""

    def __init__(self, targets: Sequence[Objects], found: Sequence[Found], kind: Kind) -> None:
        _, evaluation, _ = coco_tools()
        with redirect_stdout(io.StringIO()):
            self._eval = evaluation(_truth(targets, kind), _answers(targets, found, kind), kind)
            self._eval.evaluate()

    def average_precision(self) -> AveragePrecision:
        """As COCO reports it: over ten overlaps from 0.5 to 0.95, and at two of them; by the size of objects."""
        with redirect_stdout(io.StringIO()):
            self._eval.accumulate()
            self._eval.summarize()
        ap, ap50, ap75, *sizes = map(float, self._eval.stats[:6])
        small, medium, large = (None if value < 0 else value for value in sizes)  # below 0 there are no such objects
        return AveragePrecision(ap=ap, ap50=ap50, ap75=ap75, ap_small=small, ap_medium=medium, ap_large=large)

    def by_category(self) -> list[float | None]:
        """The average precision of every category; None for one without objects. After `average_precision`."""
        precision = self._eval.eval["precision"][:, :, :, 0, -1]  # (T, recalls, categories)
        return [None if (each < 0).all() else float(each.mean()) for each in np.moveaxis(precision, 2, 0)]

    def resampled(self, draws: Floats) -> Floats:
        """(N,): the average precision if each image were there as often as `draws` (N, I) says."""
        total, categories = np.zeros(len(draws)), np.zeros(len(draws))
        for category in self._categories():
            objects = draws @ category.objects
            categories += objects > 0
            step = max(1, _AT_ONCE // max(len(category.image), 1))
            for start in range(0, len(draws), step):
                part = slice(start, start + step)
                total[part] += _precision(category, draws[part], objects[part])
        return total / np.maximum(categories, 1)

    @property
    def detections(self) -> int:
        """How many are of a class that has objects."""
        return sum(len(category.image) for category in self._categories())

    def _categories(self) -> Iterator[_Category]:
        """Those that have objects."""
        params = self._eval._paramsEval
        images, sizes = len(params.imgIds), len(params.areaRng)
        for number in range(len(params.catIds)):
            start = number * sizes * images  # the first of the sizes is that of all objects
            inside = [(image, self._eval.evalImgs[start + image]) for image in range(images)]
            known = [(image, each) for image, each in inside if each is not None]
            if not known:
                continue
            objects = np.zeros(images)
            for image, each in known:
                objects[image] = np.count_nonzero(np.equal(each["gtIgnore"], 0))
            if not objects.any():  # such a category has no precision
                continue
            scores = np.concatenate([each["dtScores"][:_MOST] for _, each in known])
            order = np.argsort(-scores, kind="mergesort")
            matched, ignored = (
                np.concatenate([each[name][:, :_MOST] for _, each in known], axis=1)[:, order].astype(bool)
                for name in ("dtMatches", "dtIgnore")
            )
            lengths = [len(each["dtScores"][:_MOST]) for _, each in known]
            places = np.repeat([image for image, _ in known], lengths)[order]
            yield _Category(places, matched & ~ignored, ~ignored, objects)


def _precision(category: _Category, draws: Floats, objects: Floats) -> Floats:
    """(N,): precision of a category, averaged over recalls and overlaps; 0 where it has no `objects` (N,)."""
    weights = draws[:, category.image]  # (N, D)
    total = np.zeros(len(draws))
    for right, counts in zip(category.right, category.counts, strict=True):
        hits = np.cumsum(weights[:, right], axis=1)  # (N, P)
        if not hits.shape[1]:
            continue
        seen = np.cumsum(weights * counts, axis=1)[:, right]
        precision = hits / (seen + np.spacing(1))
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]  # at this recall or a higher one
        for row in range(len(draws)):
            place = np.searchsorted(hits[row] / max(objects[row], 1), _RECALLS, side="left")
            total[row] += best[row][place[place < hits.shape[1]]].sum()
    return np.where(objects > 0, total / (len(_RECALLS) * len(category.right)), 0.0)


def draws_of(images: int, detections: int) -> Floats:
    """(N, I): how often each image is drawn, with replacement, by a fixed seed. Fewer draws for more detections."""
    low, high = _DRAWS
    count = min(high, max(low, _WORK // max(10 * detections, 1)))
    return np.random.default_rng(0).multinomial(images, np.full(images, 1 / images), size=count).astype(np.float64)


def has_outlines(targets: Sequence[Objects]) -> bool:
    """Whether every object has an outline, so that masks can be judged."""
    return all(each.outline is not None for target in targets for each in target.annotations)


def listed(targets: Sequence[Objects], found: Sequence[Found]) -> list[dict[str, Any]]:
    """In the format of COCO's results: a box and a mask of each detection."""
    return [
        {
            "image_id": target.image,
            "category_id": target.categories[label],
            "bbox": list(box),
            "score": score,
            "segmentation": {"size": list(target.size), "counts": mask},
        }
        for target, each in zip(targets, found, strict=True)
        for box, score, label, mask in zip(each.boxes, each.scores, each.labels, each.masks, strict=True)
    ]


def _truth(targets: Sequence[Objects], kind: Kind) -> Any:
    annotations = [
        {
            "image_id": target.image,
            "category_id": target.categories[each.label],
            "bbox": list(each.box),
            "area": each.area,
            "iscrowd": int(each.crowd),
            **({"segmentation": each.outline} if kind == "segm" else {}),
        }
        for target in targets
        for each in target.annotations
    ]
    return _indexed(targets, annotations)


def _answers(targets: Sequence[Objects], found: Sequence[Found], kind: Kind) -> Any:
    _, _, encoding = coco_tools()
    annotations: list[dict[str, Any]] = []
    for each in listed(targets, found):
        sides = each["bbox"][2:]
        area = sides[0] * sides[1] if kind == "bbox" else float(encoding.area(each["segmentation"]))
        annotations.append({**each, "area": area, "iscrowd": 0})
    return _indexed(targets, annotations)


def _indexed(targets: Sequence[Objects], annotations: Sequence[Mapping[str, Any]]) -> Any:
    """A COCO of these annotations, numbered from 1: 0 stands for no match."""
    coco = coco_tools()[0]()
    coco.dataset = {
        "images": [{"id": each.image, "height": each.size[0], "width": each.size[1]} for each in targets],
        "annotations": [{**each, "id": number} for number, each in enumerate(annotations, start=1)],
        "categories": [{"id": key, "name": str(key)} for key in targets[0].categories],
    }
    coco.createIndex()
    return coco
