"""One dense pass over unlabelled images: step sizes of the tokens that will be dropped, statistics of their scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import DataError
from ssmprune_cli.interface import Mixers, Pruner, ScanAlignment, ScanStatistics, Stage, Wanted
from ssmprune_cli.preprocessing import Preparation
from ssmprune_cli.pruning.correction import Repaired
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.pruner import PruneSettings
from ssmprune_cli.pruning.reduction import REDUCTIONS, rank
from ssmprune_cli.pruning.schedule import share
from ssmprune_cli.tokens import TokenSequence


class Observable(Protocol):
    """What calibration looks at: a backbone, or the inside of a user's module."""

    pruner: Pruner | None

    @property
    def mixers(self) -> Mixers: ...

    @property
    def stages(self) -> tuple[Stage, ...]: ...

    def observe(self, images: Any) -> None: ...


class Prunable(Observable, Protocol):
    """A backbone, as pruning sees it."""

    @property
    def output_layer(self) -> nn.Linear: ...

    @property
    def image_size(self) -> tuple[int, int]: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def preprocessing(self) -> Preparation: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    @property
    def any_size(self) -> bool: ...

    @property
    def restores(self) -> bool: ...

    def forward(self, images: Tensor) -> Any: ...


@dataclass(frozen=True)
class PointStatistics:
    """What calibration saw at one prune point.

    kept       of each image (K,) dense positions of the kept tokens, protected ones included
    mean, std  of the importance score over patch tokens and images
    mass_kept  mean over images of the share of the (non-negative) score that the kept patch tokens carry, or None
    """

    point: int
    kept: tuple[Tensor, ...] = field(repr=False)
    mean: float
    std: float
    mass_kept: float | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "point": self.point,
            "importance_mean": self.mean,
            "importance_std": self.std,
            "importance_mass_kept": self.mass_kept,
            "kept_positions": [each.tolist() for each in self.kept],
        }


@dataclass(frozen=True)
class Calibration:
    """What was seen on so many images.

    deltas  one entry a block, mean steps (directions, E) of the tokens dropped before it, float64, or None. A
            rectangular reduction drops none: they are those of all patch tokens
    points  none for a rectangular reduction, which goes by no score
    repair  what a repair did, on these images and more; None if none was asked for
    """

    images: int
    deltas: tuple[Tensor | None, ...] = field(repr=False)
    points: tuple[PointStatistics, ...]
    repair: Repaired | None = None


class _Observer(nn.Module, Pruner):
    """A pruner that drops nothing: it notes what `settings` would drop, and the true step sizes of those tokens."""

    def __init__(self, settings: PruneSettings, stages: Sequence[Stage]) -> None:
        super().__init__()
        self.settings = settings
        self.starts = {stage.start for stage in stages}
        self.whole = [stage.num_patches for stage in stages for _ in range(stage.start, stage.stop)]
        self.observed = set(settings.schedule.blocks_after_points(stages))
        self.rectangular = REDUCTIONS.get(settings.reduction).rectangular
        points = () if self.rectangular else settings.schedule.points
        self.importance = IMPORTANCES.get(settings.importance)
        self.dropped: Tensor | None = None  # (B, L) bool
        self.delta_sum: dict[int, Tensor] = {}
        self.delta_count: dict[int, int] = {}
        self.scores: dict[int, list[Tensor]] = {point: [] for point in points}
        self.kept: dict[int, list[Tensor]] = {point: [] for point in points}

    def wants(self, block: int) -> Wanted:
        if block in self.observed:
            return "delta"
        if block + 1 in self.scores:
            return self.importance.needs
        return "tokens" if block in self.starts else "nothing"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if block in self.starts:
            self.dropped = torch.zeros_like(sequence.positions, dtype=torch.bool)
        if self.rectangular:
            self.dropped = ~sequence.is_protected()
        assert self.dropped is not None
        count = int(self.dropped.sum())
        if block in self.observed and count and statistics.delta:  # a foreign block may have no scan to tell it
            total = torch.stack([delta[self.dropped].double().sum(dim=0) for delta in statistics.delta])
            self.delta_sum[block] = self.delta_sum.get(block, torch.zeros_like(total)) + total
            self.delta_count[block] = self.delta_count.get(block, 0) + count
        if block + 1 in self.scores:
            score = self.importance.score(sequence, statistics, block, self.settings.seed)
            self._select(block + 1, sequence, score)
        return sequence

    def _select(self, point: int, sequence: TokenSequence, score: Tensor) -> None:
        assert self.dropped is not None
        if not torch.isfinite(score).all():
            raise DataError(
                f"the importance score after block {point} is not finite on the calibration images",
                hint="Check the weights with `ssmprune inspect` and the images' preprocessing.",
            )
        schedule = self.settings.schedule
        protected = len(sequence.protected)
        count = schedule.tokens[schedule.points.index(point)]
        count = share(count, self.whole[point - 1], sequence.length - protected) + protected
        open_score = score.masked_fill(self.dropped, -torch.inf)
        kept = rank(sequence, open_score)[:, :count].sort(dim=1).values
        self.dropped = torch.ones_like(self.dropped).scatter(1, kept, False)
        self.kept[point].append(kept)
        self.scores[point].append(score.masked_fill(sequence.is_protected(), torch.nan))


def calibrate(model: Observable, settings: PruneSettings, batches: Iterable[Any]) -> Calibration:
    """Run the dense `model` on `batches` of normalised images (B, 3, H, W) and observe what `settings` would drop.
    Batches may be anything that `model.observe` takes and whose length is the number of samples.

    Which tokens go is judged on the dense model's scores: one pass is enough, and the step sizes are the true ones.
    Raises DataError when there are no images or a score is not finite. The model's own pruner is left in place.
    """
    observer, images, pruner = _Observer(settings, model.stages), 0, model.pruner
    model.pruner = observer
    try:
        with torch.inference_mode():
            for batch in batches:
                model.observe(batch)
                images += len(batch)
    finally:
        model.pruner = pruner
    if not images:
        raise DataError("there are no calibration images")
    deltas = tuple(
        observer.delta_sum[block] / observer.delta_count[block] if block in observer.delta_sum else None
        for block in range(len(model.mixers))
    )
    points = tuple(_summary(point, observer.kept[point], scores) for point, scores in observer.scores.items())
    return Calibration(images, deltas, points)


def _summary(point: int, kept: Sequence[Tensor], scores: Sequence[Tensor]) -> PointStatistics:
    """Of batches, (B, K) and (B, L) each, whose images may be of another size in each."""
    patches = torch.cat([score[~score.isnan()] for score in scores]).double()
    filled = [score.nan_to_num(nan=0.0).double() for score in scores]
    mass = None
    if all(bool((each >= 0).all()) and bool((each.sum(dim=1) > 0).all()) for each in filled):
        shares = [each.gather(1, index).sum(dim=1) / each.sum(dim=1) for each, index in zip(filled, kept, strict=True)]
        mass = float(torch.cat(shares).mean())
    images = tuple(image for batch in kept for image in batch)
    return PointStatistics(point, images, float(patches.mean()), float(patches.std(unbiased=False)), mass)
