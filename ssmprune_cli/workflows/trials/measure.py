"""What a search asks of a model: how far a pruned variant is from the dense one on a few images, and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmprune_cli.data import ImageDataset, batches
from ssmprune_cli.errors import DataError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.models import Backbone, resize
from ssmprune_cli.pruning import (
    ALIGNMENTS,
    PruneSettings,
    TokenPruner,
    calibrate,
    divergence,
    fit_mass,
    restore,
    soft_divergence,
)
from ssmprune_cli.workflows.measure import count_flops
from ssmprune_cli.workflows.trials.state import SavedState


class Prepared(Iterable[Tensor]):
    """The images of `dataset` as `model` takes them, batches (B, 3, H, W) on its device; read anew each time.

    done  called with how many of how many are read
    """

    def __init__(
        self, model: Backbone, dataset: ImageDataset, batch_size: int, done: Callable[[int, int], None] | None = None
    ) -> None:
        self._model, self._dataset, self._batch_size, self._done = model, dataset, batch_size, done

    def __iter__(self) -> Iterator[Tensor]:
        device, read = next(self._model.parameters()).device, 0
        for batch in batches(self._dataset, self._model.preprocessing, self._batch_size):
            yield batch.images.to(device)
            read += len(batch.images)
            if self._done:
                self._done(read, len(self._dataset))


def load_images(model: Backbone, dataset: ImageDataset) -> Tensor:
    """All images of `dataset`, prepared for `model`: (images, 3, H, W) on its device."""
    return torch.cat(list(Prepared(model, dataset, 64)))


def run(session: Session, batches: Iterable[Tensor]) -> Tensor:
    """(images, classes) float64 logits, on the CPU, of batches (B, 3, H, W)."""
    with torch.inference_mode():
        return torch.cat([session(batch).double().cpu() for batch in batches])


@dataclass(frozen=True)
class Variant:
    """A pruned model, for images of `side` pixels if that is not None. A schedule without points drops nothing."""

    settings: PruneSettings
    side: int | None = None


class Distances(NamedTuple):
    """From the dense model, (N,) float64 each, image by image: `divergence`, and `soft_divergence`. All are infinite if
    one image's logits are not finite."""

    nats: Tensor
    soft: Tensor


class Measurements:
    """Pruned variants of `model` on fixed unlabelled `images` (N, 3, H, W); every result goes through `state`.

    calibration  how many of the images, from the first, alignment is calibrated on
    load         model -> the same images, prepared for it: for `at`
    dense        logits (N, classes) to be near to, of a dense model that sees the images larger; by default of `model`
    Raises DataError, naming the image by its number, if the dense model's logits are not finite or all alike.
    """

    def __init__(
        self,
        model: Backbone,
        images: Tensor | Callable[[], Tensor],
        *,
        calibration: int,
        batch_size: int = 32,
        state: SavedState | None = None,
        load: Callable[[Backbone], Tensor] | None = None,
        dense: Tensor | None = None,
        prefix: str = "",
    ) -> None:
        self.model = model.eval()
        self._images = images
        self.state = state or SavedState(None, {})
        self._calibration = calibration
        self._batch_size = batch_size
        self._pruners: dict[PruneSettings, TokenPruner] = {}
        self._sizes: dict[int, Measurements] = {}
        self.load = load
        self._prefix = prefix
        restore(model)
        self.session = prepare(model)  # of the model as it is; pruned ones share its weights
        if dense is not None:
            self.dense = dense
            return
        images = self.images
        self.dense = run(self.session, images.split(batch_size))
        bad = (~self.dense.isfinite().all(dim=1)).nonzero()
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
    def images(self) -> Tensor:
        """(N, 3, H, W), read when they are first needed: what a size costs needs none."""
        if not isinstance(self._images, Tensor):
            self._images = self._images()
        return self._images

    @cached_property
    def dense_cost(self) -> int:
        """Multiply-adds of the model as it is."""
        return int(self._count(None)["total"])

    def at(self, side: int | None) -> Measurements:
        """Of the same model for images of `side` pixels; None is its own size. Needs `load`."""
        if side is None:
            return self
        if side not in self._sizes:
            assert self.load is not None
            restore(self.model)
            model = resize(self.model, side)
            self._sizes[side] = Measurements(
                model,
                partial(self.load, model),
                calibration=self._calibration,
                batch_size=self._batch_size,
                state=self.state,
                dense=self.dense,
                prefix=f"{side} pixels ",
            )
        return self._sizes[side]

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
        alignment, batches = (
            ALIGNMENTS.get(settings.alignment),
            self.images[: self._calibration].split(self._batch_size),
        )
        if not alignment.needs_calibration:
            pruner = self.pruner(settings)
            if alignment.needs_sizes:
                fit_mass(self.model, pruner, batches, self.dense[: self._calibration], self.session.with_pruner)
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
            session = self.session.with_pruner(self.model.pruner)
            logits = run(session, self.images[rows].split(self._batch_size))
            restore(self.model)
            if not bool(logits.isfinite().all()):
                return None
            dense = self.dense[rows]
            return [divergence(dense, logits).tolist(), soft_divergence(dense, logits).tolist()]

        found = self.state.get(f"{self._prefix}distances {part.start}:{part.stop} {_key(settings)}", compute)
        both = torch.tensor(found or [[math.inf] * len(part)] * 2, dtype=torch.float64)
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


def _key(settings: PruneSettings | None) -> str:
    return "dense" if settings is None else json.dumps(settings.to_dict(), sort_keys=True)
