"""Semantic segmentation: the class of every pixel, judged by the mean intersection over union (mIoU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import NOT_JUDGED, Batch, ImageDataset, is_ade20k
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import Frame
from ssmprune_cli.report import ClassIou, ModelSegmentation, Report, Sample, SegmentationFacts
from ssmprune_cli.tasks.bootstrap import RESAMPLES, interval
from ssmprune_cli.tasks.confusion import Counts, counted, resampled, shares
from ssmprune_cli.tasks.painted import differing, painted
from ssmprune_cli.tasks.task import Drawing, Estimate, LimitKind, Loss, Row, Task, TaskLimit, drop_limit
from ssmprune_cli.tasks.words import bootstrap, gained, in_percent, losses, share

GRID = 32  # rows and columns of pixels of an image by which models are compared
_NUMBERS = 1 << 26  # logits of an image that are enlarged at once
_CHANGED = 0.01  # of an image's pixels


@dataclass(frozen=True)
class Windows:
    """Height and width of windows, and by how much they move, in pixels of the prepared image."""

    crop: tuple[int, int]
    stride: tuple[int, int]


def _miou(score: ModelSegmentation, compared: SegmentationFacts | None) -> Estimate:
    """mIoU in per cent."""
    ends = score.interval
    return Estimate(100 * score.miou, None if ends is None else (100 * ends[0], 100 * ends[1]))


class Segmentation(Task[ModelSegmentation, SegmentationFacts]):
    """Outputs are logits (B, classes, H, W) of the prepared images; a result is `Counts`.

    windows  that an image is looked at through; None is the image as a whole, as the published configurations test
    """

    name = "segmentation"
    datasets = ("ade20k", "segfolder")
    section = "segmentation"
    quality = "accuracy"
    parts = ("class", "classes")
    part_metric = "IoU"
    unharmed = "No class has a lower IoU than before."
    metric = "mIoU"
    hub_task = "image-segmentation"
    hub_metric = "mean_iou"
    key = "miou"
    most = 1
    calibrates = 16
    draws = True
    limits = (
        drop_limit("mIoU"),
        TaskLimit(
            LimitKind(
                "min_miou",
                0.0,
                100.0,
                floor=True,
                words="mIoU is {value:.2f} %{within}; --min-miou asks for {limit:g}",
            ),
            _miou,
        ),
    )

    def __init__(self, windows: Windows | None = None) -> None:
        self._windows = windows

    def kind(self, path: Path) -> str:
        """ADE20K by its folder's name; any other is two folders."""
        return "ade20k" if is_ade20k(path) else "segfolder"

    def sliding(self, crop: tuple[int, int], stride: tuple[int, int]) -> Segmentation:
        if any(step > side for step, side in zip(stride, crop, strict=True)):
            raise UsageError("windows that move by more than their size leave pixels out", where="--slide")
        return Segmentation(Windows(crop, stride))

    def check(self, model: Backbone, dataset: ImageDataset) -> None:
        """The classes of `dataset` must be those of `model`, in the same order as far as both name them."""
        if not 2 <= model.num_classes <= NOT_JUDGED:
            raise DataError(f"a model of {model.num_classes} classes: masks of 8 bits judge 2 to {NOT_JUDGED}")
        if not len(dataset) or not isinstance(dataset.target(0), np.ndarray):
            raise DataError(
                "the images have no masks, so there is nothing to judge pixels by",
                hint=f"Fitting kinds of dataset are {', '.join(self.datasets)}.",
            )
        if dataset.num_classes is not None and dataset.num_classes != model.num_classes:
            raise DataError(
                f"the images have {dataset.num_classes} classes, the model has {model.num_classes}",
                hint="mIoU means nothing across different classes. Is this the right dataset? A line `void` in its "
                "classes.txt names a value that is not judged.",
            )
        own = [name.casefold() for name in model.class_names]
        theirs = [name.casefold() for name in dataset.class_names]
        if own != theirs and sorted(own) == sorted(theirs):
            at = next(index for index, pair in enumerate(zip(own, theirs, strict=True)) if pair[0] != pair[1])
            raise DataError(
                f"the images have the model's classes in another order: class {at} is {theirs[at]!r}, and the model's "
                f"is {own[at]!r}"
            )

    def answer(self, forward: Callable[[Tensor], Any], images: Tensor) -> Tensor:
        """Logits (B, classes, H, W); through windows, the mean of those of all windows that a pixel is in."""
        if self._windows is None:
            whole: Tensor = forward(images)
            return whole
        height, width = images.shape[2:]
        total: Tensor | None = None
        count = torch.zeros(1, 1, height, width, device=images.device)
        for top, bottom in _spans(height, self._windows.crop[0], self._windows.stride[0]):
            for left, right in _spans(width, self._windows.crop[1], self._windows.stride[1]):
                logits = forward(images[:, :, top:bottom, left:right])
                if total is None:
                    total = logits.new_zeros(*logits.shape[:2], height, width, dtype=torch.float32)
                total[:, :, top:bottom, left:right] += logits
                count[:, :, top:bottom, left:right] += 1
        assert total is not None
        return total / count

    def results(self, outputs: Tensor, batch: Batch) -> list[Counts]:
        return [
            counted(
                classes_of(logits, frame.scaled, frame.original),
                torch.from_numpy(fitting(target, frame.original, len(logits), name)).to(logits.device),
                len(logits),
            )
            for logits, target, frame, name in zip(outputs, batch.targets, batch.frames, batch.names, strict=True)
        ]

    def sample(self, outputs: Tensor) -> Tensor:
        """The logits (B, classes, GRID, GRID) of pixels that are spread evenly: distances from a thousand pixels of an
        image tell models apart, and those of all of them would not fit into memory."""
        rows, columns = (
            ((torch.arange(GRID, device=outputs.device) + 0.5) * side / GRID).long() for side in outputs.shape[2:]
        )
        return outputs[:, :, rows][..., columns].float()

    def score(self, results: Sequence[Counts], model: Backbone, dataset: ImageDataset) -> ModelSegmentation:
        counts = np.stack(results)
        (drawn,) = resampled([counts])
        return _score(counts, drawn, dataset.class_names or model.class_names)

    def compare(
        self,
        pruned: tuple[Sequence[Counts], ModelSegmentation],
        dense: tuple[Sequence[Counts], ModelSegmentation],
        dataset: ImageDataset,
    ) -> SegmentationFacts:
        own, other = resampled([np.stack(results) for results, _ in (pruned, dense)])
        difference = pruned[1].miou - dense[1].miou
        return SegmentationFacts(
            **pruned[1].model_dump(),
            count=len(dataset),
            dense=dense[1],
            difference=difference,
            difference_interval=interval(own - other, difference) if len(dataset) > 1 else None,
        )

    def changed(self, pruned: Sequence[Counts], dense: Sequence[Counts]) -> list[int]:
        """Images with at least one in a hundred pixels more, or fewer, that are named rightly."""
        pairs = zip(pruned, dense, strict=True)
        return [
            index
            for index, (own, other) in enumerate(pairs)
            if abs(int(own[0].sum()) - int(other[0].sum())) > _CHANGED * int(own[1].sum())
        ]

    def drawn(self, image: Image.Image, frames: tuple[Frame, Frame], dense: Tensor, pruned: Tensor) -> Drawing:
        size = (image.height, image.width)
        other, own = (
            classes_of(each[0], frame.scaled, size).cpu().numpy()
            for each, frame in zip((dense, pruned), frames, strict=True)
        )
        pixels = np.asarray(image)
        pictures = {
            "dense": painted(pixels, other),
            "pruned": painted(pixels, own),
            "differs": differing(pixels, own, other),
        }
        return Drawing(
            {title: Image.fromarray(each) for title, each in pictures.items()},
            f"{100 * float((own != other).mean()):.1f} % of the pixels change their class",
        )

    def estimate(self, score: ModelSegmentation) -> Estimate:
        return Estimate(score.miou, score.interval)

    def rows(self, compared: SegmentationFacts) -> list[Row]:
        dense, ends = compared.dense, compared.difference_interval
        return [
            Row(
                f"mIoU on {compared.count:,} images (95 % interval)",
                share(dense.miou, dense.interval),
                share(compared.miou, compared.interval),
                f"{100 * compared.difference:+.2f} points",
                "" if ends is None else in_percent(ends, "{:+.2f}"),
                better=gained(ends),
            ),
            *(
                Row(title, f"{100 * before:.2f} %", f"{100 * after:.2f} %", f"{100 * (after - before):+.2f} points")
                for title, before, after in (
                    ("pixels named rightly (aAcc)", dense.aacc, compared.aacc),
                    ("the same, mean over classes (mAcc)", dense.macc, compared.macc),
                )
            ),
        ]

    def brief(self, compared: SegmentationFacts) -> Row:
        ends = compared.difference_interval
        return Row(
            f"mIoU on {compared.count:,} images (%)",
            f"{100 * compared.dense.miou:.2f}",
            f"{100 * compared.miou:.2f}",
            f"{100 * compared.difference:+.2f} points",
            "" if ends is None else in_percent(ends, "{:+.2f}"),
        )

    def table(self, scores: Sequence[ModelSegmentation]) -> list[list[str]]:
        return [
            ["mIoU (%)", *(f"{100 * one.miou:.2f}" for one in scores)],
            [
                "  95 % interval",
                *("-" if one.interval is None else in_percent(one.interval, "{:.2f}") for one in scores),
            ],
            ["aAcc (%)", *(f"{100 * one.aacc:.2f}" for one in scores)],
            ["mAcc (%)", *(f"{100 * one.macc:.2f}" for one in scores)],
        ]

    def columns(self, score: ModelSegmentation) -> dict[str, float | None]:
        low, high = score.interval or (None, None)
        return {"miou": score.miou, "miou_low": low, "miou_high": high, "aacc": score.aacc, "macc": score.macc}

    def by_part(self, scores: Sequence[ModelSegmentation]) -> list[list[str]]:
        """The IoU of each class."""
        return [
            [_name(first), *(_percent(one.classes[first.index].iou) for one in scores)] for first in scores[0].classes
        ]

    def difference(self, compared: SegmentationFacts) -> str:
        return f"Difference in mIoU: {100 * compared.difference:+.2f} percentage points ({self._method(compared)})"

    def test(self, compared: SegmentationFacts) -> str:
        return f"mIoU: {self._method(compared)}."

    def _method(self, compared: SegmentationFacts) -> str:
        return bootstrap(compared.difference_interval, compared.count, RESAMPLES)

    def losses(self, compared: SegmentationFacts, count: int) -> list[Loss]:
        pairs = zip(compared.dense.classes, compared.classes, strict=True)
        return losses(pairs, lambda each: each.iou, lambda each: (_name(each), each.images), _percent, count)

    def answers(self, report: Report, sample: Sample) -> str:
        return f"{sample.name}: {sample.words}"


def classes_of(logits: Tensor, scaled: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """The class (H, W) of every pixel of the image as it was read, from logits (classes, h, w) of the prepared image.

    scaled  the part of h and w that is image, and not padding
    The logits are enlarged, and not the classes (bilinear, align_corners False): in parts, for memory's sake.
    """
    inside = logits[None, :, : scaled[0], : scaled[1]].float()
    at_once = max(1, _NUMBERS // (original[0] * original[1]))
    best: Tensor | None = None
    classes = torch.zeros(original, dtype=torch.uint8, device=logits.device)
    for first in range(0, len(logits), at_once):
        part = functional.interpolate(
            inside[:, first : first + at_once], original, mode="bilinear", align_corners=False
        )
        values, found = part[0].max(dim=0)
        if best is None:
            best, classes = values, found.to(torch.uint8)
        else:
            more = values > best  # of equals the lower class
            best, classes = torch.where(more, values, best), torch.where(more, (found + first).to(torch.uint8), classes)
    return classes


def fitting(target: object, size: tuple[int, int], classes: int, name: str) -> NDArray[np.uint8]:
    """The target of an image of `size` as a mask. DataError, naming the image, if it is none or has other classes."""
    if not isinstance(target, np.ndarray):
        raise DataError("has no mask", where=name)
    if target.shape != size:
        (height, width), (rows, columns) = size, target.shape
        raise DataError(
            f"has {width} x {height} pixels, and its mask has {columns} x {rows}",
            where=name,
            hint="A mask is of the size of its image, turned as the image's EXIF says.",
        )
    wrong = target[(target >= classes) & (target != NOT_JUDGED)]
    if len(wrong):
        raise DataError(
            f"has the class {int(wrong[0])} in its mask, and the model has {classes} (0 to {classes - 1}; {NOT_JUDGED} "
            "is not judged)",
            where=name,
            hint="Are these the model's classes? A line `void` in a classes.txt names a value that is not judged.",
        )
    return target


def _spans(side: int, crop: int, stride: int) -> list[tuple[int, int]]:
    """Where windows start and stop: the last one is moved back so that it ends with the image."""
    count = max(side - crop + stride - 1, 0) // stride + 1
    stops = [min(index * stride + crop, side) for index in range(count)]
    return [(max(stop - crop, 0), stop) for stop in stops]


def _score(counts: NDArray[np.int64], drawn: NDArray[np.float64], names: Sequence[str]) -> ModelSegmentation:
    found = shares(counts.sum(axis=0))
    if np.isnan(found.miou):
        raise DataError("no pixel of any mask is judged, so there is nothing to measure")
    miou, images = float(found.miou), (counts[:, 1] > 0).sum(axis=0)
    return ModelSegmentation(
        miou=miou,
        interval=interval(drawn, miou) if len(counts) > 1 else None,
        aacc=float(found.aacc),
        macc=float(found.macc),
        classes=tuple(
            ClassIou(
                index=index,
                name=names[index] if index < len(names) else None,
                images=int(images[index]),
                iou=_known(iou),
                accuracy=_known(accuracy),
            )
            for index, (iou, accuracy) in enumerate(zip(found.iou.tolist(), found.accuracy.tolist(), strict=True))
        ),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value


def _name(each: ClassIou) -> str:
    return each.name or f"class {each.index}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"
