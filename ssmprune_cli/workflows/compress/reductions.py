"""Which reduction suits a model: a handful compared on its calibration images at equal time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import ALIGNMENTS, Method, PruneSchedule, choose_alignment
from ssmprune_cli.workflows.trials import Clock, Images, Measurements, TimeTable, run, schedule_at, solve

CANDIDATES = ("drop", "context", "local-merge", "pool", "frozen-pairs", "grid-merge")
MOST_IMAGES = 128
_FEWEST_IMAGES = 4
MOST_SECONDS = 120.0  # for the divergences of all candidates, unless the user says how many images


@dataclass(frozen=True)
class Choice:
    """A candidate: its schedule takes the same time as the others', and its mean divergence, of so many `images`, is in
    nats."""

    method: Method
    schedule: PruneSchedule
    divergence: float
    images: int


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
    seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> list[Choice]:
    """The candidates that can be had with `alignment`, the best first: the least soft divergence from the dense model.

    Each prunes at the points of `schedule`, in proportion, so hard that it takes the time of dropping with the schedule
    itself. `images` are prepared for `model`; a batch of `batch_size` is timed. `dense` is what `run` gives of a dense
    model that sees these images larger; without it `model` is the dense one. Only the first of the images are taken,
    though at least four, if the divergences of all would take more than about so many `seconds`. Raises UsageError if
    no candidate fits.
    """
    if alignment != "auto":
        ALIGNMENTS.get(alignment)
    most = min(MOST_IMAGES, _affordable(model, images, seconds / len(candidates)))
    images = images[:most]
    dense = None if dense is None else dense[:most]
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
    for number, method in enumerate(methods):
        if progress:
            progress(number, len(methods))
        build = partial(schedule_at, model.stages, schedule.points, weights, rectangular=method.rectangular)
        solved = solve(build, clock.of(method), share)
        if solved is not None:
            distances = measurements.distances(method.settings(solved, seed), range(len(images)))
            choice = Choice(method, solved, float(distances.nats.mean()), len(images))
            found.append((float(distances.soft.mean()), choice))
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def _affordable(model: Backbone, images: Images, seconds: float) -> int:
    """How many images a candidate can be calibrated and judged on in about so many seconds; all of a few."""
    if math.isinf(seconds) or len(images) <= _FEWEST_IMAGES:
        return len(images)
    session, one = prepare(model), images[0][None]
    run(session, [one])
    start = time.perf_counter()
    run(session, [one])
    return max(_FEWEST_IMAGES, int(seconds / (2 * (time.perf_counter() - start))))


def _weights(model: Backbone, schedule: PruneSchedule) -> list[float]:
    """How hard each point prunes, as `schedule_at` takes it."""
    weights = []
    for i, (point, tokens) in enumerate(zip(schedule.points, schedule.tokens, strict=True)):
        stage = next(stage for stage in model.stages if stage.start < point < stage.stop)
        first = i == 0 or schedule.points[i - 1] <= stage.start
        weights.append(max(0.0, -math.log(tokens / (stage.num_patches if first else schedule.tokens[i - 1]))))
    return weights
