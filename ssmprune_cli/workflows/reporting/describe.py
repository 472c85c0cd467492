"""The parts of a report that are read off a model or measured on it."""

from __future__ import annotations

import platform
import time
from typing import Any

import torch

import ssmprune_cli
from ssmprune_cli.kernels import active_backend, refused_backends
from ssmprune_cli.models import FAMILIES, Backbone, blocks_left_out, dense_config
from ssmprune_cli.pruning import Calibration, Repaired, TokenPruner
from ssmprune_cli.report import (
    CalibrationFacts,
    Figures,
    ModelSpeed,
    PointFacts,
    PruningFacts,
    RepairFacts,
    Report,
    SpeedFacts,
)
from ssmprune_cli.statistics import ratio_of_medians
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.measure import Progress, bytes_moved, count_flops, machine, resolve_device
from ssmprune_cli.workflows.profile import Profile, profile, tokens_per_block


def describe(model: Backbone) -> Report:
    """What can be said of `model` without its source: it is compared with itself without its pruner, and of the size
    that it was made of."""
    inner, config = model.pruner, dense_config(model.config)
    smaller = config != model.config
    pruned = figures(model) if inner is not None or smaller or model.eight_bit_kinds else None
    model.pruner = None
    dense = figures(_of_its_size(model, config) if smaller else model)
    model.pruner = inner
    return Report(
        family=model.family,
        task=model.task,
        image_size=model.image_size,
        resized_from=model.config.resized_from,
        blocks_left_out=tuple(block + 1 for block in blocks_left_out(model)),
        parameters=model.parameter_count,
        pruning=pruning_facts(inner) if isinstance(inner, TokenPruner) else None,
        dense=dense,
        pruned=pruned,
        provenance=versions(next(model.parameters()).device),
    )


def _of_its_size(model: Backbone, config: Any) -> Backbone:
    """A model of `config`, which has the family of `model`: whatever its weights, it costs what that one did."""
    like = next(model.parameters())
    return FAMILIES.get(model.family).build(config).to(like.device, like.dtype)


def versions(device: torch.device) -> dict[str, Any]:
    """What a report's figures were made with, on `device`."""
    return {
        "ssmprune": ssmprune_cli.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "machine": machine(device),
        "backend": active_backend(device),
        "backends_refused": refused_backends(device),
    }


def figures(model: Backbone) -> Figures:
    count = count_flops(model)
    return Figures(
        multiply_adds_all_directions=count.all_directions,
        multiply_adds_one_direction=count.one_direction,
        tokens_per_block=tokens_per_block(model),
        multiply_adds_per_block=count.per_block,
        bytes_moved=bytes_moved(model),
        multiply_adds_head=count.head,
    )


def pruning_facts(pruner: TokenPruner, keep: float | tuple[float, ...] | None = None) -> PruningFacts:
    settings = pruner.settings
    return PruningFacts(
        points=settings.schedule.points,
        keep=keep,
        tokens=settings.schedule.tokens,
        importance=settings.importance,
        reduction=settings.reduction,
        alignment=settings.alignment,
        repair=settings.repair,
        returning=settings.returning,
    )


def calibration_facts(calibration: Calibration) -> CalibrationFacts:
    points = []
    for point in calibration.points:
        values = point.to_dict()
        del values["kept_positions"]  # in calibration.json
        points.append(PointFacts(**values))
    return CalibrationFacts(images=calibration.images, points=tuple(points))


def repair_facts(repaired: Repaired) -> RepairFacts:
    return RepairFacts(
        kind=repaired.kind,
        images=repaired.images,
        held_back=repaired.held_back,
        divergence_before=repaired.before,
        divergence_after=repaired.after,
        change_interval=repaired.change,
        refused=dict(repaired.refused),
        seconds=repaired.seconds,
    )


def speed_facts(
    dense: Backbone, pruned: Backbone, device: str, batch_size: int | None, progress: Progress | None = None
) -> SpeedFacts:
    """Both models timed in turns on batches of images of their own size (see `profile`): ten rounds, or fewer where a
    forward pass takes more than 2 s."""
    batch_size = TASKS.get(dense.task).at_once(8, batch_size)
    images = dense.to(resolve_device(device)).eval().example(batch_size)
    start = time.perf_counter()
    with torch.inference_mode():
        dense(images)
    rounds = timed_rounds(time.perf_counter() - start)
    first, second = profile([dense, pruned], batch_size=batch_size, device=device, rounds=rounds, progress=progress)
    ratio, interval = ratio_of_medians(first.speed.rounds_ms, second.speed.rounds_ms)
    return SpeedFacts(
        batch_size=first.batch_size,
        rounds=first.speed.rounds,
        device=first.device,
        threads=first.threads,
        backend=first.backend,
        dense=_model_speed(first),
        pruned=_model_speed(second),
        latency_ratio=ratio,
        latency_ratio_interval=interval,
    )


def timed_rounds(seconds: float) -> int:
    """Rounds for a forward pass of so many seconds: ten, as long as that is 20 s a model, and three at least."""
    return max(3, min(10, int(20 / seconds)))


def _model_speed(figures: Profile) -> ModelSpeed:
    return ModelSpeed(
        median_ms=figures.speed.median_ms,
        quartiles_ms=figures.speed.quartiles_ms,
        images_per_second=figures.speed.images_per_second,
        peak_memory_bytes=figures.peak_memory_bytes,
        time_ms=figures.time_ms,
        floor_ms=figures.floor.total_ms,
    )
