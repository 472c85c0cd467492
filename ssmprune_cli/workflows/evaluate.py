"""`ssmprune eval`: accuracy on labelled images, of one model or of two on the same images."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.report import ClassChange
from ssmprune_cli.statistics import mcnemar_p_value, paired_interval, wilson_interval
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.processes import gathered, this_process

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Accuracy:
    """One model's share of right answers.

    top5               None if there are fewer than 5 classes
    interval           95 % interval of top-1 (Wilson)
    images_per_second  of the model alone, without reading images; the first batch is left out if there are more
    """

    top1: float
    top5: float | None
    interval: tuple[float, float]
    images_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "top1": self.top1,
            "top5": self.top5,
            "interval": list(self.interval),
            "images_per_second": self.images_per_second,
        }


@dataclass(frozen=True)
class Comparison:
    """Top-1 of a model minus that of `dense`, its reference, on the same images, as a fraction.

    difference_interval  95 % interval of the paired difference (Tango's score method)
    p_value              exact McNemar test, two-sided
    classes              those with images, the greatest loss first
    """

    dense: Accuracy
    difference: float
    difference_interval: tuple[float, float]
    p_value: float
    classes: tuple[ClassChange, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "dense": self.dense.to_dict(),
            "difference": self.difference,
            "difference_interval": list(self.difference_interval),
            "p_value": self.p_value,
            "classes": [each.model_dump() for each in self.classes],
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found on `count` images, of a model with weights in `dtype`.

    notes  of the dataset: the order of its classes where others are possible, what was left out
    """

    count: int
    dtype: str
    accuracy: Accuracy
    comparison: Comparison | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        compared = self.comparison.to_dict() if self.comparison else {}
        facts = {"count": self.count, "dtype": self.dtype, "notes": list(self.notes)}
        return {**facts, **self.accuracy.to_dict(), **compared}


class _Score:
    """Counts one model's right answers and the time it takes."""

    def __init__(self, model: Backbone, device: torch.device, role: str) -> None:
        self._session = prepare(model, device=device)
        self._num_classes = model.num_classes
        self._device = device
        self._role = role
        self._seconds: list[float] = []
        self._sizes: list[int] = []
        self._ranks: list[Tensor] = []  # (B,) rank of the right class, 0 for a right answer

    def add(self, images: Tensor, labels: Tensor, names: tuple[str, ...]) -> None:
        images = images.to(self._device, self._session.dtype)
        self._synchronize()
        start = time.perf_counter()
        logits = self._session(images)
        self._synchronize()
        self._seconds.append(time.perf_counter() - start)
        self._sizes.append(len(images))
        logits = logits.cpu()
        bad = (~logits.isfinite().all(dim=1)).nonzero()
        if len(bad):
            raise SsmpruneError(
                f"{self._role} gives logits that are not finite",
                where=names[int(bad[0])],
                hint="`ssmprune inspect` shows whether the weights are finite.",
            )
        # A stable order: among equal logits the lowest class comes first, so that equal logits are no right answers.
        order = logits.argsort(dim=1, descending=True, stable=True)
        self._ranks.append((order == labels[:, None]).int().argmax(dim=1))

    def collect(self) -> None:
        """Bring the answers of all processes together: process r has images r, r + n, r + 2n, ..."""
        mine = torch.cat(self._ranks).tolist() if self._ranks else []
        timed = slice(1, None) if len(self._sizes) > 1 else slice(None)
        found = gathered((mine, sum(self._sizes[timed]), sum(self._seconds[timed])))
        ranks = torch.empty(sum(len(part) for part, _, _ in found), dtype=torch.int64)
        for rank, (part, _, _) in enumerate(found):
            ranks[rank :: len(found)] = torch.tensor(part, dtype=torch.int64)
        self._all = ranks
        self._speed = sum(size / seconds for _, size, seconds in found if seconds)

    def right(self) -> Tensor:
        return self._all == 0

    def accuracy(self) -> Accuracy:
        ranks = self._all
        right = int((ranks == 0).sum())
        return Accuracy(
            top1=right / len(ranks),
            top5=int((ranks < 5).sum()) / len(ranks) if self._num_classes >= 5 else None,
            interval=wilson_interval(right, len(ranks)),
            images_per_second=self._speed,
        )

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def evaluate(
    model: Backbone,
    dataset: ImageDataset,
    *,
    batch_size: int = 64,
    limit: int | None = None,
    compare: Backbone | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """Top-1 and top-5 of `model` on `dataset`; with `compare`, the dense model, the paired difference between the two.

    limit  use so many images, always the same ones, drawn from the whole dataset (see `spread`)

    Each model gets images prepared its own way, and is computed by a session on `device`. Started by
    `torchrun` or `accelerate launch`, every process takes a share of the images, and all get the same result.
    Raises DataError if the images have no labels or their classes do not fit the model; SsmpruneError, naming the
    image, for logits that are not finite.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError("the batch size and the limit must be at least 1")
    if limit is not None and limit < len(dataset):
        dataset = Subset(dataset, spread(len(dataset), limit))
    models = [model] if compare is None else [model, compare]
    for each in models:
        _check(each, dataset)
    target = resolve_device(device)
    roles = ["the model", "the model to compare with"]
    scores = [_Score(each, target, role) for each, role in zip(models, roles, strict=False)]
    ways = list(dict.fromkeys(each.preprocessing for each in models))
    share = this_process()
    mine = dataset if share.processes == 1 else Subset(dataset, range(share.rank, len(dataset), share.processes))
    streams = [batches(mine, way, batch_size) for way in ways]
    done = 0
    with torch.inference_mode():
        for prepared in zip(*streams, strict=True):
            for each, score in zip(models, scores, strict=True):
                batch = prepared[ways.index(each.preprocessing)]
                assert batch.labels is not None  # by _check
                score.add(batch.images, batch.labels, batch.names)
            done += len(prepared[0].names)
            if progress:
                progress(done, len(mine))
    for score in scores:
        score.collect()
    comparison = _compare(scores[0], scores[1], dataset) if compare is not None else None
    dtype = str(model.dtype).removeprefix("torch.")
    return Evaluation(len(dataset), dtype, scores[0].accuracy(), comparison, dataset.notes)


def spread(total: int, count: int) -> list[int]:
    """`count` different indices below `total`, ascending: a random one, always the same, from each of equal stretches.

    From equal stretches because datasets are sorted by class; at random because classes may also alternate.
    """
    choice = random.Random(0)
    return [choice.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]


def _compare(pruned: _Score, dense: _Score, dataset: ImageDataset) -> Comparison:
    first, second = pruned.right(), dense.right()
    labels = torch.tensor([dataset.label(index) for index in range(len(dataset))])
    names = dataset.class_names
    classes = [
        ClassChange(
            index=label,
            name=names[label] if label < len(names) else None,
            images=int(inside.sum()),
            right_dense=int(second[inside].sum()),
            right_pruned=int(first[inside].sum()),
        )
        for label in labels.unique().tolist()
        for inside in [labels == label]
    ]
    gained, lost = int((first & ~second).sum()), int((second & ~first).sum())
    return Comparison(
        dense=dense.accuracy(),
        difference=(gained - lost) / len(first),
        difference_interval=paired_interval(gained, lost, len(first)),
        p_value=mcnemar_p_value(gained, lost),
        classes=tuple(sorted(classes, key=lambda each: (each.right_pruned - each.right_dense) / each.images)),
    )


def _check(model: Backbone, dataset: ImageDataset) -> None:
    """The classes of `dataset` must be those of `model`: otherwise the score is low for no fault of the model."""
    if dataset.num_classes is not None and dataset.num_classes != model.num_classes:
        raise DataError(
            f"the images have {dataset.num_classes} classes, the model has {model.num_classes}",
            hint="Accuracy means nothing across different classes. Is this the right dataset kind and folder?",
        )
    for index in range(len(dataset)):
        label = dataset.label(index)
        if label is None:
            raise DataError("the images have no labels, so there is no accuracy to measure")
        if not 0 <= label < model.num_classes:
            raise DataError(
                f"has the label {label}, and the model has {model.num_classes} classes (0 to {model.num_classes - 1})",
                where=dataset.name(index),
            )
