"""`ssmprune sensitivity`: what pruning at a single point costs, for every point and several ratios.

One dense pass over the images is shared by all measurements.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.data import fingerprint
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import Method, PruneSchedule, PruneSettings, TokenPruner, choose_alignment
from ssmprune_cli.report import Sensitivity, SensitivityFacts
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.identity import run_identity
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Images, Measurements, SavedState, in_batches, load_images

Progress = Callable[[int, int], None]
BATCH_SIZE = 16


class _Tap(nn.Module, Pruner):
    """A pruner that lets `inner`, or nothing, prune, and keeps what leaves the last block."""

    def __init__(self, inner: TokenPruner | None, last: int) -> None:
        super().__init__()
        self.inner = inner
        self.last = last
        self.tokens: Tensor | None = None  # (B, L, d)
        self.positions: Tensor | None = None  # (B, L)

    def wants(self, block: int) -> Wanted:
        wanted = "nothing" if self.inner is None else self.inner.wants(block)
        return at_least_tokens(wanted) if block == self.last else wanted

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block) if self.inner is not None else None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if block == self.last:
            self.tokens, self.positions = sequence.stream.float(), sequence.dense_positions()
        if self.inner is None:
            return sequence
        pruned: TokenSequence = self.inner(block, sequence, statistics)
        return pruned


def sensitivity(
    source: Source,
    calib: Path,
    *,
    ratios: Sequence[float] = (0.9, 0.7, 0.5),
    importance: str = "clip",
    reduction: str = "context",
    alignment: str = "auto",
    images: int = 64,
    seed: int = 0,
    device: str = "cpu",
    state_path: Path | None = None,
    announce: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> tuple[Sensitivity, SavedState]:
    """Every possible point with every ratio, of the model's weights, and the state that remembers them.

    announce  is told, after the dense pass, about how long it will take
    Raises UsageError for a ratio that is none, DataError for images or logits that cannot be used.
    """
    if any(not 0 < ratio < 1 for ratio in ratios):
        raise UsageError("ratios of tokens kept lie between 0 and 1", where="--keep")
    model = source.load().to(resolve_device(device))
    method = Method(importance, reduction, choose_alignment(alignment, reduction, calibrated=True))
    dataset = TASKS.get(model.task).calibration(model, calib, images, seed)
    if len(dataset) < 2:
        raise DataError("a sensitivity needs at least two images", where=str(calib))
    identity = run_identity(model, device)
    state = SavedState(
        state_path,
        {**identity, "images": fingerprint(dataset), "method": str(method), "seed": seed},
    )
    start = time.perf_counter()
    pixels, at_once = load_images(model, dataset), TASKS.get(model.task).at_once(BATCH_SIZE)
    measurements = Measurements(model, pixels, calibration=len(dataset), batch_size=at_once, state=state)
    dense = _tokens(model, None, pixels)
    points = [point for stage in model.stages for point in range(stage.start + 1, stage.stop)]
    if not points:
        raise UsageError("no stage of this model has two blocks, so there is no place to prune after")
    cases = [(point, ratio) for point in points for ratio in ratios]
    if announce is not None:
        # Two dense passes and a count have run; a case is a calibration, a pruned pass and a count.
        seconds = (time.perf_counter() - start) * len(cases)
        for note in dataset.notes:
            announce(note)
        announce(f"{len(cases)} measurements, about {_duration(seconds)}; {state.found} results are known already.")
    found = []
    for number, (point, ratio) in enumerate(cases, start=1):
        schedule = PruneSchedule.resolve(model.stages, points=[point], keep=ratio, rectangular=method.rectangular)
        settings = method.settings(schedule, seed)
        values = state.get(f"sensitivity {point} {ratio!r}", partial(_measure, measurements, settings, dense))
        found.append(SensitivityFacts(point=point, keep=ratio, **values))
        if progress is not None:
            progress(number, len(cases))
    sha256 = identity["weights_sha256"]
    return Sensitivity(weights_sha256=sha256, task=model.task, measurements=tuple(found)), state


@dataclass(frozen=True)
class _Seen:
    """Of every batch, on the CPU: what distances are computed from, the tokens after the last block (B, L, d) and their
    positions (B, L)."""

    samples: list[Tensor]
    tokens: list[Tensor]
    positions: list[Tensor]

    @cached_property
    def sample(self) -> Tensor:
        """(images, ...)"""
        return torch.cat(self.samples)


def _measure(measurements: Measurements, settings: PruneSettings, dense: _Seen) -> dict[str, Any]:
    multiply_adds = measurements.multiply_adds(settings) / measurements.dense_cost
    measurements.prune(settings)
    model = measurements.model
    assert isinstance(model.pruner, TokenPruner)
    found = _tokens(model, model.pruner, measurements.images)
    model.pruner = None
    nats = measurements.task.divergence(dense.sample, found.sample)
    errors = []
    for tokens, positions, whole in zip(found.tokens, found.positions, dense.tokens, strict=True):
        true = whole.gather(1, positions[..., None].expand_as(tokens))
        errors.append((tokens - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1))
    error = torch.cat(errors)
    finite = bool(nats.isfinite().all() and error.isfinite().all())
    return {
        "divergence": float(nats.mean()) if finite else None,
        "divergence_se": float(nats.std()) / math.sqrt(len(nats)) if finite else None,
        "token_error": float(error.mean()) if finite else None,
        "multiply_adds": multiply_adds,
    }


def _tokens(model: Backbone, pruner: TokenPruner | None, images: Images) -> _Seen:
    tap = _Tap(pruner, len(model.mixers) - 1)
    model.pruner = tap
    task, seen = TASKS.get(model.task), _Seen([], [], [])
    try:
        with torch.inference_mode():
            for batch in in_batches(images, task.at_once(BATCH_SIZE)):
                seen.samples.append(task.sample(model(batch)).cpu())
                assert tap.tokens is not None and tap.positions is not None
                seen.tokens.append(tap.tokens.cpu())
                seen.positions.append(tap.positions.cpu())
    finally:
        model.pruner = None
    return seen


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
