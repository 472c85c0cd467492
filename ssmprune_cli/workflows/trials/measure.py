"""What a search asks of a model: how far a pruned variant is from the dense one on a few images, and what it costs."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmprune_cli.data import Batch, ImageDataset, batches
from ssmprune_cli.errors import DataError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.interface import Pruner
from ssmprune_cli.models import WHOLE, Backbone, Size, put_in_eight_bits, smaller
from ssmprune_cli.pruning import (
    ALIGNMENTS,
    PruneSettings,
    Runner,
    TokenPruner,
    calibrate,
    fit_mass,
    quick_answers,
    restore,
)
from ssmprune_cli.tasks import TASKS, Task
from ssmprune_cli.workflows.measure import count_flops
from ssmprune_cli.workflows.trials.state import SavedState

Images = Tensor | list[Tensor]
"""Prepared images: (N, 3, H, W), or (3, H, W) each where their sizes differ."""


class Prepared(Iterable[Tensor]):
    """The images of `dataset` as `model` takes them, batches (B, 3, H, W) on its device; read anew each time.

    done  called with how many of how many are read
    """

    def __init__(
        self, model: Backbone, dataset: ImageDataset, batch_size: int, done: Callable[[int, int], None] | None = None
    ) -> None:
        self._model, self._dataset, self._batch_size, self._done = model, dataset, batch_size, done

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches():
            yield batch.images

    def batches(self) -> Iterator[Batch]:
        """The same with targets, frames and names."""
        device, read = next(self._model.parameters()).device, 0
        for batch in batches(self._dataset, self._model.preprocessing, self._batch_size):
            yield replace(batch, images=batch.images.to(device))
            read += len(batch.images)
            if self._done:
                self._done(read, len(self._dataset))


def load_images(model: Backbone, dataset: ImageDataset) -> Images:
    """All images of `dataset`, prepared for `model`, on its device."""
    parts = list(Prepared(model, dataset, 64))
    if len({part.shape[2:] for part in parts}) == 1:
        return torch.cat(parts)
    return [image for part in parts for image in part]


def in_batches(images: Images, batch_size: int) -> list[Tensor]:
    """Batches (B, 3, H, W) of `batch_size` images in order, or fewer where the size changes."""
    if isinstance(images, Tensor):
        return list(images.split(batch_size))
    found: list[list[Tensor]] = []
    for image in images:
        if found and len(found[-1]) < batch_size and found[-1][0].shape == image.shape:
            found[-1].append(image)
        else:
            found.append([image])
    return [torch.stack(group) for group in found]


def run(session: Session, batches: Iterable[Tensor]) -> Tensor:
    """(images, ...) on the CPU: what the distance of two models is computed from (`Task.sample`), of batches
    (B, 3, H, W). Of a classifier that are its logits (images, classes) in float64."""
    task = task_of(session)
    with torch.inference_mode():
        return torch.cat([task.sample(session(batch)).cpu() for batch in batches])


def sampled(session: Session) -> Runner:
    """The model of a session with one pruner or another, as far as distances are computed from its answers."""
    task = task_of(session)

    def with_pruner(pruner: Pruner | None) -> Callable[[Tensor], Tensor]:
        run = session.with_pruner(pruner)
        return lambda images: task.sample(run(images))

    return with_pruner


def task_of(session: Session) -> Task[Any, Any]:
    """What the model of a session is for."""
    assert isinstance(session.definition, Backbone)
    return TASKS.get(session.definition.task)


@dataclass(frozen=True)
class Variant:
    """A pruned model, made of one of `size`. A schedule without points drops nothing."""

    settings: PruneSettings
    size: Size = WHOLE


class Distances(NamedTuple):
    """From the dense model, (N,) float64 each, image by image: the task's `divergence`, and `soft_divergence`. All are
    infinite if one image's logits are not finite."""

    nats: Tensor
    soft: Tensor


class Measurements:
    """Pruned variants of `model` on fixed unlabelled `images`; every result goes through `state`.

    calibration  how many of the images, from the first, alignment is calibrated on
    load         model -> the same images, prepared for it: for `at`
    dense        what to be near to, as `run` gives it, of a dense model that is larger; by default of `model`
    int8         kinds of linear layers that are in eight bits in every variant, also in one that drops nothing: they
                 are pruned and calibrated in float, as a recipe does it, and judged and timed with such weights
    Raises DataError, naming the image by its number, if the dense model's logits are not finite or all alike.
    """

    def __init__(
        self,
        model: Backbone,
        images: Images | Callable[[], Images],
        *,
        calibration: int,
        batch_size: int = 32,
        state: SavedState | None = None,
        load: Callable[[Backbone], Images] | None = None,
        dense: Tensor | None = None,
        int8: Sequence[str] = (),
        prefix: str = "",
    ) -> None:
        self.model = model.eval()
        self._images = images
        self.state = state or SavedState(None, {})
        self._calibration = calibration
        self._batch_size = batch_size
        self._pruners: dict[PruneSettings, TokenPruner] = {}
        self._sizes: dict[Size, Measurements] = {}
        self.load = load
        self._prefix = prefix
        self.int8 = tuple(int8)
        restore(model)
        self.session = prepare(model)  # of the model as it is; pruned ones share its weights
        self.delivered = self.session if not int8 else prepare(_in_eight_bits(model, int8))  # as variants are run
        self.task = task_of(self.session)
        if dense is not None:
            self.dense = dense
            return
        images = self.images
        self.dense = run(self.session, in_batches(images, batch_size))
        bad = (~self.dense.isfinite().flatten(1).all(dim=1)).nonzero()
        if len(bad):
            raise DataError(
                f"the dense model's logits of calibration image {int(bad[0]) + 1} are not finite",
                hint="`ssmprune inspect` shows whether the weights are finite.",
            )
        if len(images) > 1 and float((self.dense - self.dense[0]).abs().max()) == 0:
            raise DataError(
                "the dense model gives the same logits for all calibration images, so there is nothing to compare",
                hint="Give images that differ, or look at the weights with `ssmprune inspect`.",
            )

    @property
    def images(self) -> Images:
        """Read when they are first needed: what a size costs needs none."""
        if callable(self._images):
            self._images = self._images()
        return self._images

    @cached_property
    def dense_cost(self) -> int:
        """Multiply-adds of the model as it is."""
        return int(self._count(None)["total"])

    def at(self, size: Size) -> Measurements:
        """Of the same model made smaller; for other images that needs `load`."""
        if size == WHOLE:
            return self
        if size not in self._sizes:
            restore(self.model)
            model = smaller(self.model, size)
            self._sizes[size] = Measurements(
                model,
                partial(self._images_for, model, size),
                calibration=self._calibration,
                batch_size=self._batch_size,
                state=self.state,
                dense=self.dense,
                int8=self.int8,
                prefix=f"{size} ",
            )
        return self._sizes[size]

    def _images_for(self, model: Backbone, size: Size) -> Images:
        """Models of one side, whatever their blocks, share the images."""
        if size.cut:
            return self.at(replace(size, cut=0)).images
        assert self.load is not None
        return self.load(model)

    def prune(self, settings: PruneSettings) -> None:
        """Make the model the pruned one, its alignment calibrated."""
        if not settings.schedule.points:
            restore(self.model)
            return
        if settings not in self._pruners:
            restore(self.model)
            self._pruners[settings] = self._calibrated(settings)
        self.model.pruner = self._pruners[settings]

    def _calibrated(self, settings: PruneSettings) -> TokenPruner:
        """As `pruning.compress` makes it, without the statistics of scores and without what is not calibrated."""
        alignment = ALIGNMENTS.get(settings.alignment)
        batches = in_batches(self.images[: self._calibration], self._batch_size)
        if not alignment.needs_calibration:
            pruner = self.pruner(settings)
            if alignment.needs_sizes:
                dense = self.dense[: self._calibration]
                fit_mass(self.model, pruner, batches, dense, sampled(self.session), self.task.divergence)
            return pruner
        deltas = calibrate(self.model, settings, batches).deltas
        like = next(self.model.parameters())
        return TokenPruner(settings, self.model.stages, self.model.mixers, deltas).to(like.device, like.dtype)

    def pruner(self, settings: PruneSettings) -> TokenPruner:
        """One that is not calibrated: it costs and takes as much as one that is."""
        like = next(self.model.parameters())
        return TokenPruner(settings, self.model.stages, self.model.mixers).to(like.device, like.dtype)

    def distances(self, settings: PruneSettings, part: range) -> Distances:
        """Of the images with these numbers."""

        def compute() -> list[list[float]] | None:
            self.prune(settings)
            rows = slice(part.start, part.stop)
            session = self.delivered.with_pruner(self.model.pruner)
            logits = run(session, in_batches(self.images[rows], self._batch_size))
            restore(self.model)
            return self._distances(self.dense[rows], logits)

        return self._known(f"distances {part.start}:{part.stop} {_key(settings)}", len(part), compute)

    def repaired(self, settings: PruneSettings, part: range, *, side: bool) -> Distances:
        """As `distances`, once a quick repair on these images has mended what it can (see `quick_answers`); `side` says
        whether it may have side features."""

        def compute() -> list[list[float]] | None:
            self.prune(settings)
            pruner = self.model.pruner
            assert pruner is None or isinstance(pruner, TokenPruner)
            restore(self.model)
            rows = slice(part.start, part.stop)
            batches, dense = in_batches(self.images[rows], self._batch_size), self.dense[rows]
            logits = quick_answers(self.model, pruner, batches, self.delivered.with_pruner, dense, side=side)
            return self._distances(dense, logits)

        kind = "head+side" if side else "head"
        return self._known(f"quick {kind} {part.start}:{part.stop} {_key(settings)}", len(part), compute)

    def _distances(self, dense: Tensor, found: Tensor) -> list[list[float]] | None:
        if not bool(found.isfinite().all()):
            return None
        return [self.task.divergence(dense, found).tolist(), self.task.soft_divergence(dense, found).tolist()]

    def _known(self, key: str, count: int, compute: Callable[[], list[list[float]] | None]) -> Distances:
        found = self.state.get(f"{self._prefix}{key}", compute)
        both = torch.tensor(found or [[math.inf] * count] * 2, dtype=torch.float64)
        return Distances(both[0], both[1])

    def multiply_adds(self, settings: PruneSettings) -> int:
        """Of one image, all scan directions counted, by `count_flops`."""
        return int(self._count(settings)["total"])

    def per_block(self, settings: PruneSettings) -> Sequence[int]:
        """The multiply-adds of every block."""
        blocks: list[int] = self._count(settings)["blocks"]
        return blocks

    def _count(self, settings: PruneSettings | None) -> dict[str, Any]:
        def compute() -> dict[str, Any]:
            if settings is None or not settings.schedule.points:
                restore(self.model)
            else:
                self.model.pruner = self.pruner(settings)
            count = count_flops(self.model)
            restore(self.model)
            return {"total": count.all_directions, "blocks": list(count.per_block)}

        return self.state.get(f"{self._prefix}multiply-adds {_key(settings)}", compute)


def _in_eight_bits(model: Backbone, kinds: Sequence[str]) -> Backbone:
    """A copy of `model` with the weights of these kinds of layers in eight bits."""
    rounded = copy.deepcopy(model)
    put_in_eight_bits(rounded, rounded.layers_of(kinds))
    return rounded


def _key(settings: PruneSettings | None) -> str:
    return "dense" if settings is None else json.dumps(settings.to_dict(), sort_keys=True)
