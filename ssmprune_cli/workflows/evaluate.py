"""`ssmprune eval`: how one model does on labelled images, or two on the same ones; what that means, its task says."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from ssmprune_cli.data import Batch, ImageDataset, Subset, batches
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export import OnnxSession
from ssmprune_cli.interface import placed
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import ClipPreprocessing
from ssmprune_cli.tasks import TASKS, Task
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.processes import gathered, this_process
from ssmprune_cli.workflows.subject import definition_of, session_of

Progress = Callable[[int, int], None]  # (images done, images in all)


@dataclass(frozen=True)
class Views:
    """How many views of a clip are judged together: see ClipPreprocessing."""

    segments: int = 1
    crops: int = 1

    def of(self, way: Any) -> ClipPreprocessing:
        """What each is prepared for, by the `way` of a model of clips."""
        prepared: ClipPreprocessing = replace(way, segments=self.segments, crops=self.crops)
        return prepared

    def __str__(self) -> str:
        counts = ((self.segments, "segment"), (self.crops, "crop"))
        return " x ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured on `count` images, of a model with weights in `dtype`.

    score              the facts that the model's task has of one model, such as ModelAccuracy
    images_per_second  of the model alone, without reading images; the first batch is left out if there are more
    comparison         those that it has of a pruned and a dense model on the same images, such as AccuracyFacts
    views              of each clip; None of images
    notes              the dataset's, such as the order of its classes where others are possible, and the task's remarks
    changed            with `comparison`: indices in the whole dataset of images that one model is right on
    images             that were judged, and the `results` that the task keeps of each
    """

    count: int
    dtype: str
    task: Task[Any, Any]
    score: Any
    images_per_second: float
    comparison: Any | None = None
    dense_images_per_second: float | None = None
    views: Views | None = None
    notes: tuple[str, ...] = ()
    changed: tuple[int, ...] = ()
    images: ImageDataset | None = field(default=None, repr=False)
    results: Sequence[Any] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"count": self.count, "dtype": self.dtype, "notes": list(self.notes)}
        if self.views is not None:
            facts["views"] = asdict(self.views)
        own = {**facts, **self.score.model_dump(mode="json")}
        own["images_per_second"] = self.images_per_second
        if self.comparison is None:
            return own
        compared = self.comparison.model_dump(mode="json")
        dense = {**compared.pop("dense"), "images_per_second": self.dense_images_per_second}
        return {**own, "dense": dense, **{key: value for key, value in compared.items() if key not in own}}


class _Judge:
    """Collects one model's results, and the time it takes."""

    def __init__(self, model: Backbone | OnnxSession, task: Task[Any, Any], device: torch.device, role: str) -> None:
        self._model = definition_of(model)
        self._session = session_of(model, device)
        self._task = task
        self._device = device
        self._role = role
        self._seconds: list[float] = []
        self._sizes: list[int] = []
        self._results: list[Any] = []

    def add(self, batch: Batch) -> None:
        images = placed(batch.images, self._device, self._session.dtype)
        self._synchronize()
        start = time.perf_counter()
        outputs = self._task.answer(self._session, images)
        self._synchronize()
        self._seconds.append(time.perf_counter() - start)
        self._sizes.append(len(images))
        bad = (~self._task.finite(outputs)).nonzero()
        if len(bad):
            raise SsmpruneError(
                f"{self._role} gives logits that are not finite",
                where=batch.names[int(bad[0])],
                hint="`ssmprune inspect` shows whether the weights are finite.",
            )
        self._results += self._task.results(outputs, batch)

    def collect(self, dataset: ImageDataset) -> tuple[list[Any], Any, float]:
        """Results and speed of all processes, and the score: process r has images r, r + n, r + 2n, ..."""
        timed = slice(1, None) if len(self._sizes) > 1 else slice(None)
        parts = gathered((self._results, sum(self._sizes[timed]), sum(self._seconds[timed])))
        results: list[Any] = [None] * sum(len(part) for part, _, _ in parts)
        for rank, (part, _, _) in enumerate(parts):
            results[rank :: len(parts)] = part
        speed = sum(size / seconds for _, size, seconds in parts if seconds)
        return results, self._task.score(results, self._model, dataset), speed

    @property
    def computes_in(self) -> str:
        return self._session.computes_in

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def evaluate(
    model: Backbone | OnnxSession,
    dataset: ImageDataset,
    *,
    batch_size: int | None = None,
    limit: int | None = None,
    compare: Backbone | OnnxSession | None = None,
    task: Task[Any, Any] | None = None,
    views: Views | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> Evaluation:
    """The score of `model` on `dataset`; with `compare`, the dense model, the paired difference between the two. Each
    may be an exported file.

    batch_size  of images at once; without one, what the task finds right
    limit       use so many images, always the same ones, drawn from the whole dataset (see `spread`)
    task        that of the models, if it is not to be as it is by default
    views       of each clip, one unless it is said otherwise. UsageError for models of images

    Each model gets images prepared its own way, and is computed by a session on `device`. Started by
    `torchrun` or `accelerate launch`, every process takes a share of the images, and all get the same result.
    Raises DataError if `dataset` is none that the model's task can judge it on; SsmpruneError, naming the image, for
    logits that are not finite.
    """
    models = [model] if compare is None else [model, compare]
    definitions = [definition_of(each) for each in models]
    task = TASKS.get(definitions[0].task) if task is None else task
    if views is not None and not task.clips:
        raise UsageError("are for videos, and the model takes images", where="--segments and --crops")
    views = (views or Views()) if task.clips else None
    batch_size = task.at_once(64, batch_size)
    if batch_size < 1 or (limit is not None and limit < 1):
        raise UsageError("the batch size and the limit must be at least 1")
    chosen: Sequence[int] = range(len(dataset))
    if limit is not None and limit < len(dataset):
        chosen = spread(len(dataset), limit)
        dataset = Subset(dataset, chosen)
    for each in definitions:
        task.check(each, dataset)
    target = resolve_device(device)
    roles = ["the model", "the model to compare with"]
    judges = [_Judge(one, task, target, role) for one, role in zip(models, roles, strict=False)]
    share = this_process()
    mine = dataset if share.processes == 1 else Subset(dataset, range(share.rank, len(dataset), share.processes))
    # Images are prepared once for models that take them alike. The way that is behind goes on: its batches may be
    # smaller, and times are of the same moment.
    ways = [each.preprocessing if views is None else views.of(each.preprocessing) for each in definitions]
    done = dict.fromkeys(ways, 0)
    streams = {way: batches(mine, way, batch_size) for way in done}
    with torch.inference_mode():
        while (before := min(done.values())) < len(mine):
            way = min(done, key=done.__getitem__)
            batch = next(streams[way])
            for own, judge in zip(ways, judges, strict=True):
                if own == way:
                    judge.add(batch)
            done[way] += len(batch.names)
            if progress and min(done.values()) > before:
                progress(min(done.values()), len(mine))
    results, score, speed = judges[0].collect(dataset)
    dtype = judges[0].computes_in
    of_files = dict.fromkeys(note for each in definitions for note in each.notes)  # of the same file the same is said
    notes = (*of_files, *dataset.notes, *task.remarks)
    evaluation = Evaluation(
        len(dataset), dtype, task, score, speed, views=views, notes=notes, images=dataset, results=results
    )
    if compare is None:
        return evaluation
    dense_results, dense_score, dense_speed = judges[1].collect(dataset)
    comparison = task.compare((results, score), (dense_results, dense_score), dataset)
    changed = tuple(chosen[index] for index in task.changed(results, dense_results))
    return replace(evaluation, comparison=comparison, dense_images_per_second=dense_speed, changed=changed)


def identity(dataset: ImageDataset, limit: int | None) -> str:
    """SHA-256, in hexadecimal, of the names and targets of the images that `evaluate` takes, in order, and of the
    classes' names: it tells datasets apart without reading their images."""
    indices = _taken(dataset, limit)
    facts = [list(dataset.class_names), *([dataset.name(index), dataset.mark(index)] for index in indices)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def shared(dataset: ImageDataset, limit: int | None, others: ImageDataset) -> int:
    """How many of the images that `evaluate` takes are among `others`. Reads all of both."""
    known = {others.content(index) for index in range(len(others))}
    return sum(dataset.content(index) in known for index in _taken(dataset, limit))


def _taken(dataset: ImageDataset, limit: int | None) -> Sequence[int]:
    """Numbers of the images that `evaluate` takes."""
    return range(len(dataset)) if limit is None or limit >= len(dataset) else spread(len(dataset), limit)


def spread(total: int, count: int) -> list[int]:
    """`count` different indices below `total`, ascending: a random one, always the same, from each of equal stretches.

    From equal stretches because datasets are sorted by class; at random because classes may also alternate.
    """
    choice = random.Random(0)
    return [choice.randrange(i * total // count, (i + 1) * total // count) for i in range(count)]
