"""`ssmprune eval --module`: accuracy of a user's classifier, and of the compressed one beside it."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.adapt import answer_of
from ssmprune_cli.data import Batch, ImageDataset, Subset, batches
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.evaluate import Evaluation, spread
from ssmprune_cli.workflows.measure import Progress
from ssmprune_cli.workflows.own_module.source import ModuleSource
from ssmprune_cli.workflows.own_module.timing import FAST, random_images, variants

BATCH = 32
_TASK: Any = TASKS.get("classification")


@dataclass
class _Judge:
    """One way to compute the module, and its results; `num_classes` is what the task asks of a model."""

    model: nn.Module
    num_classes: int
    seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def add(self, batch: Batch, images: Tensor) -> None:
        start = time.perf_counter()
        logits = answer_of(self.model(images))
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds.append(time.perf_counter() - start)
        self.sizes.append(len(images))
        bad = (~_TASK.finite(logits)).nonzero()
        if len(bad):
            raise SsmpruneError("the module gives logits that are not finite", where=batch.names[int(bad[0])])
        self.results += _TASK.results(logits, batch)

    @property
    def images_per_second(self) -> float:
        """Without the first batch if there are more."""
        timed = slice(1, None) if len(self.sizes) > 1 else slice(None)
        return sum(self.sizes[timed]) / sum(self.seconds[timed])


def evaluate_module(
    source: ModuleSource,
    data: Path,
    kind: str,
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, tuple[str, ...]]:
    """The accuracy of a file's module, or of a folder's compressed one with the dense one beside it, on the same
    images; and what is to be known of it. Our ops compute both.

    Raises UsageError for a module that is no classifier, DataError for images that are not of its classes.
    """
    source.check()
    way = source.preprocessing()
    dataset: ImageDataset = _TASK.open(data, kind)
    if limit is not None and limit < len(dataset):
        dataset = Subset(dataset, spread(len(dataset), limit))
    own = source.load()
    example = random_images(own, 1, way.crop)
    found = variants(own, example)
    with torch.inference_mode():
        logits = answer_of(found.models[FAST](example))
    if logits.ndim != 2 or len(logits) != 1:
        raise UsageError(
            f"answers one image with {tuple(logits.shape)}, and logits of classes are (1, classes)",
            where=f"--module {source.module}",
            hint="`eval --module` judges classifiers; `compress` and `profile` take any module.",
        )
    classes = logits.shape[1]
    judges = [_Judge(found.models[FAST], classes)]
    if source.stored is not None:
        compressed = copy.deepcopy(own)
        source.put_back(compressed)
        judges = [_Judge(compressed, classes), *judges]
    _TASK.check(judges[0], dataset)
    with torch.inference_mode():
        for batch in batches(dataset, way, batch_size or BATCH):
            images = batch.images.to(example.device, example.dtype)
            for judge in judges:
                judge.add(batch, images)
            if progress:
                progress(len(judges[0].results), len(dataset))
    return _evaluation(judges, dataset, str(example.dtype)), found.warnings


def _evaluation(judges: Sequence[_Judge], dataset: ImageDataset, dtype: str) -> Evaluation:
    scores = [_TASK.score(judge.results, judge, dataset) for judge in judges]
    first = judges[0]
    comparison = speed = None
    if len(judges) > 1:
        comparison = _TASK.compare((first.results, scores[0]), (judges[1].results, scores[1]), dataset)
        speed = judges[1].images_per_second
    return Evaluation(
        len(dataset),
        dtype.removeprefix("torch."),
        _TASK,
        scores[0],
        first.images_per_second,
        comparison=comparison,
        dense_images_per_second=speed,
        notes=dataset.notes,
        images=dataset,
        results=first.results,
    )
