"""Time as what a schedule spends: shares of the dense session's time on this device, from a table that is measured.

One row of the table is the time of a uniform variant over that of the dense model, timed in turn with it: one point
after the first block of a stage, and so many tokens in all of its other blocks. Between rows the share is linear in the
tokens of each block, and every point costs what pruning itself takes. So a few seconds tell the time of every schedule
about as well as the machine keeps time; what is chosen in the end is timed as a whole.

A smaller whole grid makes later stages cheaper too: from its row goes what the rows of those stages say of them.

Variants in eight bits are timed as such, over the dense model in float: with all tokens they take a share of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli import __version__
from ssmprune_cli.errors import BudgetError, SsmpruneError
from ssmprune_cli.files import read_bytes
from ssmprune_cli.interface import Stage
from ssmprune_cli.kernels import active_backend, cache_folders, cpu_facts
from ssmprune_cli.models import WHOLE, Backbone, Size
from ssmprune_cli.pruning import Method, PruneSchedule, PruneSettings
from ssmprune_cli.statistics import ratio_of_medians
from ssmprune_cli.workflows.measure import interleaved_speeds, machine
from ssmprune_cli.workflows.trials.cost import smallest
from ssmprune_cli.workflows.trials.measure import Measurements, Variant
from ssmprune_cli.workflows.write import write_text

_FRACTIONS = (0.9, 0.6, 0.3)  # of a stage's tokens; the first shows what it costs to prune at all
_FEW_FRACTIONS = (0.9, 0.4)  # of a stage with two or three blocks
_SECONDS = 3.0  # for the rows of one reduction
_ROUNDS = (4, 15)
_LONG = 0.25  # seconds of a forward pass: for a plan, a part of the batch that takes so long tells the shares
_STEP = 32  # of the sides of smaller images: every downsampling of a dense model then halves its grid
_TURNS = 6  # after so many it is asked whether more are needed
_NARROW = 0.03  # width of an interval, as a share, that needs no more
_STEADY = 0.15  # width of an interval, as a share, up to which a row is good enough for other runs
_MOST_POINTS = 6  # that tell what a point takes
_MOST_BYTES = 1 << 22  # of a saved table


@dataclass(frozen=True)
class Timing:
    """A variant's time over the dense model's, timed in turn, with its 95 % interval; and both in ms a batch."""

    ratio: float
    interval: tuple[float, float]
    ms: float
    dense_ms: float


class Clock:
    """Times variants of a model in turn with the dense one, on batches of `batch_size` images.

    table  rows that are known, by key; those that are measured are added
    """

    def __init__(self, measurements: Measurements, batch_size: int, table: TimeTable | None = None) -> None:
        self.measurements = measurements
        self.batch_size = batch_size
        self.table = table or TimeTable(None)
        self._models: dict[str, TimeModel] = {}
        self._once: float | None = None  # seconds of a batch of the dense model, about

    def of(self, method: Method, size: Size = WHOLE) -> TimeModel | SmallerModel:
        """Scores and alignments change little of the time: methods with one reduction share a model."""
        if method.reduction not in self._models:
            self._models[method.reduction] = TimeModel(self, method)
        whole = self._models[method.reduction]
        return whole if size == WHOLE else SmallerModel(whole, self, size)

    def of_size(self, size: Size) -> float:
        """The share of the dense model's time that the model of this size takes, all tokens kept."""
        if size == WHOLE and not self.measurements.int8:
            return 1.0
        key = f"size {size}"
        if key not in self.table.rows:
            (timing,) = self.timings([Variant(nothing_dropped(), size)], _SECONDS / 2, plan=True)
            self.table.add({key: timing})
        return self.table.rows[key]

    def dense_ms(self) -> float:
        """Milliseconds of a batch of the dense model."""
        (dense,) = interleaved_speeds([self.measurements.session], self._batch(self.measurements.model), _ROUNDS[1])
        return dense.median_ms

    def timing(self, variant: Variant) -> Timing:
        (timing,) = self.timings([variant], _SECONDS, most=40)
        return timing

    def timings(
        self, variants: Sequence[Variant], seconds: float, *, most: int = _ROUNDS[1], plan: bool = False
    ) -> list[Timing]:
        """Of several variants and the dense model in turn, for about so many seconds; less where all is steady.

        plan  a part of the batch is enough where all of it takes long; where one image does, a smaller one of a model
              that takes any size
        """
        sessions: list[nn.Module] = [self.measurements.session]
        images = [self._batch(self.measurements.model)]
        for variant in variants:
            sized = self.measurements.at(variant.size)
            dropped = bool(variant.settings.schedule.points)
            session = sized.delivered
            sessions.append(session.with_pruner(sized.pruner(variant.settings)) if dropped else session)
            images.append(self._batch(sized.model))
        once = self._seconds(images[0])
        if plan and once > _LONG:
            part = max(1, int(self.batch_size * _LONG / once))
            images, once = [each[:part] for each in images], once * part / self.batch_size
            if once > _LONG and self.measurements.model.any_size:
                pixels = images[0].numel()
                images = [_smaller(each, _LONG / once) for each in images]
                once *= images[0].numel() / pixels
        rounds = max(_ROUNDS[0], min(most, int(seconds / (once * len(sessions)))))
        taken: list[list[float]] = [[] for _ in sessions]
        timings: list[Timing] = []
        while len(taken[0]) < rounds and not (timings and all(_width(each) <= _NARROW for each in timings)):
            turns, warm_up = min(_TURNS, rounds - len(taken[0])), 0 if timings else 1
            for times, speed in zip(taken, interleaved_speeds(sessions, images, turns, warm_up=warm_up), strict=True):
                times += speed.rounds_ms
            dense_ms = statistics.median(taken[0])
            timings = [
                Timing(*ratio_of_medians(taken[0], times), statistics.median(times), dense_ms) for times in taken[1:]
            ]
        return timings

    def _seconds(self, images: Tensor) -> float:
        """Of a batch (B, 3, H, W) of the dense model: measured once, as it only says how much there is time for."""
        if self._once is None:
            (dense,) = interleaved_speeds([self.measurements.session], [images], 1, warm_up=1)
            self._once = dense.median_ms / 1e3
        return self._once

    def _batch(self, model: Backbone) -> Tensor:
        return model.example(self.batch_size)


def _smaller(images: Tensor, share: float) -> Tensor:
    """Images of about this share of the pixels, black as they are."""
    height, width = (max(_STEP, _STEP * round(side * math.sqrt(share) / _STEP)) for side in images.shape[2:])
    return images.new_zeros(*images.shape[:2], height, width)


def _width(timing: Timing) -> float:
    """Of its interval, as a share."""
    low, high = timing.interval
    return (high - low) / timing.ratio


def nothing_dropped() -> PruneSettings:
    """Settings that drop nothing."""
    return Method().settings(PruneSchedule((), ()), 0)


@dataclass(frozen=True)
class _Row:
    """A schedule to time, for the blocks of `stage` that then have `tokens`, and its name in the table."""

    schedule: PruneSchedule
    name: str
    stage: Stage
    tokens: int


class TimeModel:
    """Share of the dense model's time that a schedule of one reduction takes."""

    def __init__(self, clock: Clock, method: Method) -> None:
        self._clock = clock
        self._method = method
        self._stages = clock.measurements.model.stages
        self._all = clock.of_size(WHOLE)
        rows, many = self._rows(), self._many_points()
        names = {row.schedule: row.name for row in rows}
        if many is not None:
            names[many] = f"{many.points[0] - 1} {many.tokens[0]} {len(many.points)} points"
        ratios = self._measured(names)
        self._point = {stage.start: 0.0 for stage in self._stages}  # what pruning at a point itself takes, by stage
        self._blocks: dict[int, list[tuple[int, float]]] = {}  # by stage: tokens, change of a block's share
        self._fit(rows, ratios)
        if many is not None:
            mixers = clock.measurements.model.mixers
            work = {stage.start: stage.num_tokens * mixers[stage.start].d_inner for stage in self._stages}
            # In the rows every point is among what its blocks save. What many points take more than that is theirs.
            each = max(0.0, (ratios[many] - self._share(many)) / (len(many.points) - 1))
            self._point = {start: each * own / work[many.points[0] - 1] for start, own in work.items()}
            self._fit(rows, ratios)

    def predict(self, schedule: PruneSchedule) -> float:
        return max(self._share(schedule), 1e-3)

    def _share(self, schedule: PruneSchedule) -> float:
        return self._all + self.change(schedule, self._stages)

    def change(self, schedule: PruneSchedule, stages: Sequence[Stage]) -> float:
        """What `schedule` adds to the share, below 0 where it saves. `stages` are those of the model, or of a smaller
        one whose schedule it is: with as large a part of their tokens, blocks change as those of the model do."""
        patches = schedule.patches_per_block(stages)
        change = 0.0
        for whole, own in zip(self._stages, stages, strict=True):
            for point, tokens in zip(schedule.points, schedule.tokens, strict=True):
                if own.start < point <= own.stop and tokens < patches[point - 1]:
                    change += self._point[whole.start]
            for tokens in patches[own.start : own.stop]:
                if tokens < own.num_patches:
                    change += self._change(whole.start, round(tokens * whole.num_patches / own.num_patches))
        return change

    def _fit(self, rows: Sequence[_Row], ratios: Mapping[PruneSchedule, float]) -> None:
        self._blocks.clear()
        for stage in reversed(self._stages):  # what a row changes in later stages is known then
            own = [row for row in rows if row.stage == stage]
            known = [self._share(row.schedule) for row in own]
            least = math.inf
            for row, share in sorted(zip(own, known, strict=True), key=lambda pair: -pair[0].tokens):
                change = (ratios[row.schedule] - share) / (stage.stop - max(stage.start, row.schedule.points[0]))
                least = min(least, change)  # fewer tokens take no more time: what says so is noise
                self._blocks.setdefault(stage.start, []).append((row.tokens, least))

    def checked(self, schedule: PruneSchedule) -> float | None:
        """None: without timing every schedule it gets no better."""
        return None

    def _change(self, start: int, live: int) -> float:
        """Linear between the rows of a stage, and beyond its ends along the last two; 0 while there are none."""
        rows = sorted(self._blocks.get(start, [(live, 0.0)]))
        upper = next((i for i, (tokens, _) in enumerate(rows) if tokens >= live), len(rows) - 1)
        upper = max(upper, min(1, len(rows) - 1))
        (few, low), (many, high) = rows[max(0, upper - 1)], rows[upper]
        return low if many == few else low + (high - low) * (live - few) / (many - few)

    def _rows(self) -> list[_Row]:
        found: dict[str, _Row] = {}
        for stage in self._stages:
            depth = stage.stop - stage.start
            point = stage.start + 1
            if depth == 1:  # only what was merged before is missing in it
                point = stage.start if self._method.rectangular else 0
            if point == 0:
                continue
            before = next(each.num_patches for each in self._stages if each.start < point <= each.stop)
            for fraction in _FRACTIONS if depth > 3 else _FEW_FRACTIONS:
                schedule = self._then(PruneSchedule((), ()), point, round(fraction * before))
                tokens = schedule.patches_per_block(self._stages)[stage.stop - 1]
                name = f"{stage.start} {tokens}"
                found[name] = _Row(schedule, name, stage, tokens)
        return list(found.values())

    def _many_points(self) -> PruneSchedule | None:
        """Points in a row that prune next to nothing after the first; None for a model too shallow for it."""
        longest = max(self._stages, key=lambda stage: stage.stop - stage.start)
        if longest.stop - longest.start <= 3:
            return None
        tokens, schedule = round(_FRACTIONS[1] * longest.num_patches), PruneSchedule((), ())
        for point in range(longest.start + 1, longest.stop)[:_MOST_POINTS]:
            if tokens < 1:
                break
            schedule = self._then(schedule, point, tokens)
            tokens = schedule.tokens[-1] - 1
        return schedule if len(schedule.points) > 1 else None

    def _then(self, schedule: PruneSchedule, point: int, tokens: int) -> PruneSchedule:
        return schedule.then(point, max(1, tokens), self._stages, rectangular=self._method.rectangular)

    def _measured(self, names: Mapping[PruneSchedule, str]) -> dict[PruneSchedule, float]:
        """Shares of schedules, which have these names in the table."""
        keys = [f"{self._method.reduction} {name}" for name in names.values()]
        if any(key not in self._clock.table.rows for key in keys):
            timings = self._clock.timings(
                [Variant(self._method.settings(row, 0)) for row in names], _SECONDS, plan=True
            )
            self._clock.table.add(dict(zip(keys, timings, strict=True)))
        return {row: self._clock.table.rows[key] for row, key in zip(names, keys, strict=True)}


class SmallerModel:
    """The same for a model of another `size`: the time of that model, and what pruning the same share of tokens saves
    in the blocks that are left, in proportion to what they take with images of that size."""

    def __init__(self, whole: TimeModel, clock: Clock, size: Size) -> None:
        self._whole, self._stages = whole, clock.measurements.at(size).model.stages
        self._share, self._block = clock.of_size(size), clock.of_size(Size(size.side)) / clock.of_size(WHOLE)

    def predict(self, schedule: PruneSchedule) -> float:
        return max(self._share + self._block * self._whole.change(schedule, self._stages), 1e-3)

    def checked(self, schedule: PruneSchedule) -> float | None:
        """None: without timing every schedule it gets no better."""
        return None


def check_time(clock: Clock, methods: Sequence[Method], share: float, sizes: Sequence[Size] = ()) -> None:
    """Raises UsageError, saying what can be met, if no schedule of `methods` takes as little as `share` of dense, and
    no model of one of these `sizes` does with all tokens."""
    if not 0 < share < 1:
        raise BudgetError(f"a time to search for lies between 0 and 1 of the dense model's, not at {share:g}")
    smaller = [clock.of_size(size) for size in sizes]
    if min(smaller, default=math.inf) <= share:
        return
    stages = clock.measurements.model.stages
    by_reduction = {method.reduction: (method, smallest(stages, method)) for method in methods}.values()
    method, least = min(by_reduction, key=lambda pair: clock.of(pair[0]).predict(pair[1]))
    timing = clock.timing(Variant(method.settings(least, 0)))
    if timing.ratio > share:
        also = f", the smallest model with all tokens {min(smaller):.2f}" if smaller else ""
        raise BudgetError(
            f"{share:g} of the dense model's time cannot be reached on this device with a batch of {clock.batch_size}",
            hint=f"With one patch token left after each stage's first block a batch takes {timing.ms:.1f} ms, "
            f"{timing.ratio:.2f} of the dense model's {timing.dense_ms:.1f}{also}; ask for more, or try a larger "
            "batch.",
        )


class TimeTable:
    """Measured rows (shares of the dense time by key), in a file for the next run of the same model and machine."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, float] = {}  # what is in the file
        if path is not None and path.exists():
            with suppress(SsmpruneError, ValueError, TypeError, RecursionError):  # a broken cache is measured anew
                rows = dict(json.loads(read_bytes(path, _MOST_BYTES, SsmpruneError)))
                self._kept = {str(key): float(value) for key, value in rows.items() if 0 < float(value) < 1e3}
        self.rows = dict(self._kept)

    @classmethod
    def of(cls, model: Backbone, device: str, batch_size: int, int8: Sequence[str] = ()) -> TimeTable:
        """That of this model's shape (not its weights), device and versions, in the user's cache. `int8` are the kinds
        of layers that variants have in eight bits."""
        facts: dict[str, Any] = {
            "family": model.family,
            "config": asdict(model.config),
            "dtype": str(model.dtype),
            "device": device,
            "machine": machine(device),
            "batch_size": batch_size,
            "int8": sorted(int8),
            "threads": torch.get_num_threads(),
            "kernel": active_backend(device),
            "level": cpu_facts().get("level"),
            "torch": str(torch.__version__),
            "ssmprune": __version__,
        }
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
        folders = cache_folders()
        return cls(folders[0] / "times" / f"{name}.json" if folders else None)

    def add(self, timings: Mapping[str, Timing]) -> None:
        """Take up what was measured. In a moment too noisy to tell, it is for this run alone, not for the file."""
        shares = {key: timing.ratio for key, timing in timings.items()}
        self.rows |= shares
        steady = all(_width(timing) <= _STEADY for timing in timings.values())
        if self._path is not None and steady:
            with suppress(OSError, SsmpruneError):  # without a cache it is measured again
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._kept |= shares
                write_text(self._path, json.dumps(self._kept, indent=1) + "\n")
