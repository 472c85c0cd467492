"""Which reduction suits a model: a handful compared on its calibration images at equal time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import ALIGNMENTS, Method, PruneSchedule, choose_alignment
from ssmprune_cli.workflows.trials import Clock, Images, Measurements, TimeTable, schedule_at, solve

CANDIDATES = ("drop", "context", "local-merge", "pool", "frozen-pairs", "grid-merge")
_MOST_IMAGES = 128


@dataclass(frozen=True)
class Choice:
    """A candidate: its schedule takes the same time as the others', and its mean divergence is in nats."""

    method: Method
    schedule: PruneSchedule
    divergence: float


def compare_reductions(
    model: Backbone,
    schedule: PruneSchedule,
    images: Images,
    *,
    candidates: Sequence[str] = CANDIDATES,
    importance: str,
    alignment: str,
    batch_size: int,
    device: str,
    dense: Tensor | None = None,
    seed: int = 0,
) -> list[Choice]:
    """The candidates that can be had with `alignment`, the best first: the least soft divergence from the dense model.

    Each prunes at the points of `schedule`, in proportion, so hard that it takes the time of dropping with the schedule
    itself. `images` are prepared for `model`; a batch of `batch_size` is timed. `dense` is what `run` gives of a dense
    model that sees these images larger; without it `model` is the dense one. Raises UsageError if
    no candidate fits.
    """
    if alignment != "auto":
        ALIGNMENTS.get(alignment)
    images = images[:_MOST_IMAGES]
    dense = None if dense is None else dense[:_MOST_IMAGES]
    measurements = Measurements(model, images, calibration=len(images), batch_size=batch_size, dense=dense)
    clock = Clock(measurements, batch_size, TimeTable.of(model, device, batch_size))
    methods = []
    for reduction in candidates:
        try:
            methods.append(Method(importance, reduction, choose_alignment(alignment, reduction, calibrated=True)))
        except UsageError:
            continue
    methods = [method for method in methods if model.stages[0].frames == 1 or not method.rectangular]
    if not methods:
        raise UsageError(
            f"{alignment!r} fits none of {', '.join(candidates)}",
            where="--alignment",
            hint="Name a `--reduction` that it fits.",
        )
    share = clock.of(Method(importance, "drop")).predict(schedule)
    weights = _weights(model, schedule)
    found = []
    for method in methods:
        build = partial(schedule_at, model.stages, schedule.points, weights, rectangular=method.rectangular)
        solved = solve(build, clock.of(method), share)
        if solved is not None:
            distances = measurements.distances(method.settings(solved, seed), range(len(images)))
            found.append((float(distances.soft.mean()), Choice(method, solved, float(distances.nats.mean()))))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def _weights(model: Backbone, schedule: PruneSchedule) -> list[float]:
    """How hard each point prunes, as `schedule_at` takes it."""
    weights = []
    for i, (point, tokens) in enumerate(zip(schedule.points, schedule.tokens, strict=True)):
        stage = next(stage for stage in model.stages if stage.start < point < stage.stop)
        first = i == 0 or schedule.points[i - 1] <= stage.start
        weights.append(max(0.0, -math.log(tokens / (stage.num_patches if first else schedule.tokens[i - 1]))))
    return weights
