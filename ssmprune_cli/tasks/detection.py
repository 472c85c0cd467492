"""Detection: boxes and masks of objects, judged by COCO's average precision of boxes (box AP)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import Batch, ImageDataset, Objects
from ssmprune_cli.errors import DataError
from ssmprune_cli.inference import Session
from ssmprune_cli.models import Backbone, Detections, Detector
from ssmprune_cli.preprocessing import Frame
from ssmprune_cli.pruning import relative_error
from ssmprune_cli.report import (
    ClassPrecision,
    DetectionFacts,
    ModelDetection,
    Report,
    Sample,
)
from ssmprune_cli.tasks.average_precision import (
    Found,
    Judgement,
    coco_tools,
    draws_of,
    has_outlines,
    listed,
)
from ssmprune_cli.tasks.bootstrap import interval
from ssmprune_cli.tasks.outlined import covered, outlined
from ssmprune_cli.tasks.painted import differing
from ssmprune_cli.tasks.task import Drawing, Estimate, Loss, Row, Task, drop_limit
from ssmprune_cli.tasks.words import bootstrap, gained, in_percent, losses, share

GRID = 8  # rows and columns of places of each level by which models are compared
_SURE = 0.5  # score from which on a detection is shown to a user
_SAME = 0.5  # overlap from which on two boxes are of the same object
_FIGURES = (("AP50", "ap50"), ("AP75", "ap75"), ("small", "ap_small"), ("medium", "ap_medium"), ("large", "ap_large"))


class Seen(NamedTuple):
    """The levels of a batch, and the detector that made them and reads them."""

    levels: tuple[Tensor, ...]
    detector: Detector


class Detection(Task[ModelDetection, DetectionFacts]):
    """Outputs are the levels of the feature pyramid; a result is `Found`."""

    name = "detection"
    datasets = ("coco",)
    section = "detection"
    quality = "box AP"
    parts = ("class", "classes")
    part_metric = "AP"
    unharmed = "No class has a lower AP than before."
    metric = "box AP"
    hub_task = "object-detection"
    hub_metric = "mAP"
    key = "box_ap"
    unit = "squared error"
    most = 1
    calibrates = 8
    draws = True
    saves = True
    remarks = (
        "Multiply-adds, times and images per second are those of the backbone and the feature pyramid. What proposes "
        "boxes and reads them is left out: pruning does not change it, so a whole detector gains less than they say.",
    )
    limits = (drop_limit("box AP"),)

    def kind(self, path: Path) -> str:
        return "coco"

    def check(self, model: Backbone, dataset: ImageDataset) -> None:
        """The classes of `dataset` must be those of `model`, in the same order as far as both name them."""
        coco_tools()
        targets = _targets(dataset)
        if dataset.num_classes != model.num_classes:
            raise DataError(
                f"the images have {dataset.num_classes} classes, the model has {model.num_classes}",
                hint="Average precision means nothing across different classes. Is this the right dataset?",
            )
        own = [name.casefold() for name in model.class_names]
        theirs = [name.casefold() for name in dataset.class_names]
        if own != theirs and sorted(own) == sorted(theirs):
            at = next(index for index, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"the images have the model's classes in another order: by their ids class {at} is {theirs[at]!r}, and "
                f"the model's is {own[at]!r}"
            )
        if not any(not each.crowd for target in targets for each in target.annotations):
            raise DataError("no image has an object, so there is nothing to find")

    def answer(self, forward: Callable[[Tensor], Any], images: Tensor) -> Seen:
        detector = forward.definition if isinstance(forward, Session) else forward
        assert isinstance(detector, Detector)
        return Seen(forward(images), detector)

    def one(self, outputs: Seen, place: int) -> Seen:
        return Seen(tuple(level[place : place + 1] for level in outputs.levels), outputs.detector)

    def finite(self, outputs: Seen) -> Tensor:
        return torch.stack([level.isfinite().flatten(1).all(dim=1) for level in outputs.levels]).all(dim=0)

    def results(self, outputs: Seen, batch: Batch) -> list[Found]:
        detected = outputs.detector.read(outputs.levels, batch.frames)
        for target, frame, name in zip(batch.targets, batch.frames, batch.names, strict=True):
            if not isinstance(target, Objects):
                raise DataError("has no list of objects", where=name)
            if target.size != frame.original:
                (height, width), (rows, columns) = frame.original, target.size
                raise DataError(
                    f"has {width} x {height} pixels, and its list of objects says {columns} x {rows}",
                    where=name,
                    hint="Boxes are of the image, turned as its EXIF says.",
                )
        return [_kept(each, with_masks=True) for each in detected]

    def sample(self, outputs: Any) -> Tensor:
        """What the levels (B, L, C, GRID, GRID) are at places that are spread evenly; the last one is made of the one
        before."""
        levels = outputs.levels if isinstance(outputs, Seen) else outputs
        return torch.stack([functional.interpolate(level.float(), size=(GRID, GRID)) for level in levels[:-1]], dim=1)

    def divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """The relative squared error of each level, averaged: (B,) float64."""
        levels = zip(dense.unbind(dim=1), pruned.unbind(dim=1), strict=True)
        return torch.stack([relative_error(*pair) for pair in levels]).mean(dim=0)

    def soft_divergence(self, dense: Tensor, pruned: Tensor) -> Tensor:
        """The same: an error of features has no few images that make up most of it."""
        return self.divergence(dense, pruned)

    def score(self, results: Sequence[Found], model: Backbone, dataset: ImageDataset) -> ModelDetection:
        targets = _targets(dataset)
        boxes = Judgement(targets, results, "bbox")
        precision = boxes.average_precision()
        masks = Judgement(targets, results, "segm").average_precision() if has_outlines(targets) else None
        ends = None
        if len(targets) > 1:
            ends = interval(boxes.resampled(draws_of(len(targets), boxes.detections)), precision.ap)
        return ModelDetection(
            boxes=precision,
            masks=masks,
            interval=ends,
            classes=_classes(boxes, targets, dataset.class_names or model.class_names),
        )

    def compare(
        self,
        pruned: tuple[Sequence[Found], ModelDetection],
        dense: tuple[Sequence[Found], ModelDetection],
        dataset: ImageDataset,
    ) -> DetectionFacts:
        targets, difference, ends = _targets(dataset), pruned[1].boxes.ap - dense[1].boxes.ap, None
        if len(targets) > 1:
            both = [Judgement(targets, found, "bbox") for found, _ in (pruned, dense)]
            draws = draws_of(len(targets), sum(each.detections for each in both))
            own, other = (each.resampled(draws) for each in both)
            ends = interval(own - other, difference)
        return DetectionFacts(
            **pruned[1].model_dump(),
            count=len(dataset),
            dense=dense[1],
            difference=difference,
            difference_interval=ends,
        )

    def predictions(self, results: Sequence[Found], dataset: ImageDataset) -> str:
        """COCO's own format: a list of boxes and masks."""
        return json.dumps(listed(_targets(dataset), results)) + "\n"

    def changed(self, pruned: Sequence[Found], dense: Sequence[Found]) -> list[int]:
        """Images in which a sure detection of one model is none of the other one's, of the same class."""
        pairs = zip(pruned, dense, strict=True)
        return [index for index, (one, other) in enumerate(pairs) if _alone(one, other) + _alone(other, one)]

    def differ(self, dense: Tensor, pruned: Tensor) -> Tensor:
        return self.divergence(dense, pruned) > 0.01

    def told(self, outputs: Seen) -> list[int | None]:
        return [None] * len(outputs.levels[0])

    def drawn(self, image: Image.Image, frames: tuple[Frame, Frame], dense: Seen, pruned: Seen) -> Drawing:
        """The sure detections of both."""
        size = (image.height, image.width)
        other, own = (
            _sure(each.detector.read(each.levels, [Frame(size, frame.scaled)])[0])
            for each, frame in zip((dense, pruned), frames, strict=True)
        )
        pixels, names = np.asarray(image), dense.detector.class_names
        one, two = (_kept(each, with_masks=False) for each in (own, other))
        return Drawing(
            {
                "dense": outlined(pixels, other, names),
                "pruned": outlined(pixels, own, names),
                "differs": Image.fromarray(differing(pixels, covered(own), covered(other))),
            },
            f"objects of the dense model: {len(two.scores)}; of the pruned one: {len(one.scores)}, "
            f"{len(one.scores) - _alone(one, two)} of them in the same places",
        )

    def estimate(self, score: ModelDetection) -> Estimate:
        return Estimate(score.boxes.ap, score.interval)

    def rows(self, compared: DetectionFacts) -> list[Row]:
        dense, ends = compared.dense, compared.difference_interval
        found = [
            Row(
                f"box AP on {compared.count:,} images (95 % interval)",
                share(dense.boxes.ap, dense.interval),
                share(compared.boxes.ap, compared.interval),
                f"{100 * compared.difference:+.2f} points",
                "" if ends is None else in_percent(ends, "{:+.2f}"),
                better=gained(ends),
            )
        ]
        pairs = [(f"box {title}", dense.boxes, compared.boxes, key) for title, key in _FIGURES]
        if dense.masks is not None and compared.masks is not None:
            own = (("AP", "ap"), *_FIGURES)
            pairs += [(f"mask {title}", dense.masks, compared.masks, key) for title, key in own]
        for title, one, other, key in pairs:
            before, after = getattr(one, key), getattr(other, key)
            if before is not None and after is not None:
                change = f"{100 * (after - before):+.2f} points"
                found.append(Row(title, f"{100 * before:.2f} %", f"{100 * after:.2f} %", change))
        return found

    def brief(self, compared: DetectionFacts) -> Row:
        ends = compared.difference_interval
        return Row(
            f"box AP on {compared.count:,} images (%)",
            f"{100 * compared.dense.boxes.ap:.2f}",
            f"{100 * compared.boxes.ap:.2f}",
            f"{100 * compared.difference:+.2f} points",
            "" if ends is None else in_percent(ends, "{:+.2f}"),
        )

    def table(self, scores: Sequence[ModelDetection]) -> list[list[str]]:
        lines = [
            ["box AP (%)", *(_percent(one.boxes.ap) for one in scores)],
            [
                "  95 % interval",
                *("-" if one.interval is None else in_percent(one.interval, "{:.2f}") for one in scores),
            ],
            *([f"  {title}", *(_percent(getattr(one.boxes, key)) for one in scores)] for title, key in _FIGURES),
        ]
        masks = [one.masks for one in scores if one.masks is not None]
        if len(masks) == len(scores):
            own = (("mask AP (%)", "ap"), *((f"  {title}", key) for title, key in _FIGURES))
            lines += [[title, *(_percent(getattr(one, key)) for one in masks)] for title, key in own]
        return lines

    def columns(self, score: ModelDetection) -> dict[str, float | None]:
        low, high = score.interval or (None, None)
        masks = {} if score.masks is None else {f"mask_{key}": value for key, value in score.masks}
        return {**{f"box_{key}": value for key, value in score.boxes}, "box_ap_low": low, "box_ap_high": high, **masks}

    def by_part(self, scores: Sequence[ModelDetection]) -> list[list[str]]:
        """The box AP of each class that has objects."""
        return [
            [_name(first), *(_percent(one.classes[place].ap) for one in scores)]
            for place, first in enumerate(scores[0].classes)
        ]

    def difference(self, compared: DetectionFacts) -> str:
        return f"Difference in box AP: {100 * compared.difference:+.2f} percentage points ({self._method(compared)})"

    def test(self, compared: DetectionFacts) -> str:
        return f"Box AP: {self._method(compared)}."

    def _method(self, compared: DetectionFacts) -> str:
        return bootstrap(compared.difference_interval, compared.count)

    def losses(self, compared: DetectionFacts, count: int) -> list[Loss]:
        pairs = zip(compared.dense.classes, compared.classes, strict=True)
        return losses(pairs, lambda each: each.ap, lambda each: (_name(each), each.images), _percent, count)

    def answers(self, report: Report, sample: Sample) -> str:
        return f"{sample.name}: {sample.words}"


def _targets(dataset: ImageDataset) -> list[Objects]:
    """DataError if `dataset` is of another task."""
    targets = [each for index in range(len(dataset)) if isinstance(each := dataset.target(index), Objects)]
    if not targets or len(targets) < len(dataset):
        raise DataError(
            "the images have no lists of objects, so there is nothing to judge boxes by",
            hint=f"Fitting kinds of dataset are {', '.join(Detection.datasets)}.",
        )
    return targets


def _kept(detected: Detections, *, with_masks: bool) -> Found:
    corners = detected.boxes.double().cpu()
    boxes = torch.cat((corners[:, :2], corners[:, 2:] - corners[:, :2]), dim=1)
    masks: tuple[str, ...] = ()
    if with_masks:
        _, _, encoding = coco_tools()
        pixels = np.asfortranarray(detected.masks.permute(1, 2, 0).to(torch.uint8).cpu().numpy())  # (H, W, N)
        masks = tuple(each["counts"].decode() for each in encoding.encode(pixels))
    return Found(
        boxes=tuple(map(tuple, boxes.tolist())),
        scores=tuple(detected.scores.tolist()),
        labels=tuple(detected.labels.tolist()),
        masks=masks,
    )


def _sure(detected: Detections) -> Detections:
    sure = detected.scores >= _SURE
    return Detections(detected.boxes[sure], detected.scores[sure], detected.labels[sure], detected.masks[sure])


def _classes(boxes: Judgement, targets: Sequence[Objects], names: Sequence[str]) -> tuple[ClassPrecision, ...]:
    """Those that have objects."""
    found = []
    for label, precision in enumerate(boxes.by_category()):
        counts = [sum(each.label == label and not each.crowd for each in target.annotations) for target in targets]
        if precision is not None:
            name = names[label] if label < len(names) else None
            images = sum(count > 0 for count in counts)
            found.append(ClassPrecision(index=label, name=name, images=images, objects=sum(counts), ap=precision))
    return tuple(found)


def _alone(one: Found, other: Found) -> int:
    """How many sure detections of `one` are none of `other`."""
    return sum(
        score >= _SURE
        and not any(
            own == label and _overlap(box, rival) >= _SAME for own, rival in zip(other.labels, other.boxes, strict=True)
        )
        for box, score, label in zip(one.boxes, one.scores, one.labels, strict=True)
    )


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes: left, top, width and height."""
    width, height = (
        max(0.0, min(one[i] + one[i + 2], other[i] + other[i + 2]) - max(one[i], other[i])) for i in (0, 1)
    )
    union = one[2] * one[3] + other[2] * other[3] - width * height
    return width * height / union if union > 0 else 0.0


def _name(each: ClassPrecision) -> str:
    return each.name or f"class {each.index}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"
