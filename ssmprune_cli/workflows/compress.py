"""`ssmprune compress`: load, calibrate, prune, measure before and after, write the artefact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, batches, calibration_images, fingerprint
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner, choose_alignment, compress, restore
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.report import Figures, Report, SearchTrial
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.reporting import (
    calibration_facts,
    figures,
    pruning_facts,
    report_files,
    samples,
    speed_facts,
    versions,
)
from ssmprune_cli.workflows.source import Source

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback


def plan(source: Source, recipe: Recipe, limits: Limits) -> Report:
    """What `compress_checkpoint` would do, without reading images or writing: tokens per block and multiply-adds."""
    model = source.load()
    dense = figures(model)
    pruning = recipe.pruning
    # Every alignment source costs the same, so an uncalibrated one stands in for the calibrated one.
    alignment = "auto" if pruning.alignment == "calibrated" else pruning.alignment
    compress(model, **_arguments(recipe), alignment=alignment)
    return _judged(_report(source, model, recipe, dense, {}), limits)


def compress_checkpoint(
    source: Source,
    recipe: Recipe,
    *,
    out: Path,
    limits: Limits,
    calib: Path | None = None,
    evaluation: ImageDataset | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    progress: Progress | None = None,
    search: tuple[SearchTrial, ...] | None = None,
    sample_images: int = 4,
    command: str = "",
) -> Report:
    """Compress `source` by `recipe` and write the artefact folder `out` atomically.

    calib       unlabelled calibration images: a folder, an ImageFolder tree or an .npz
    evaluation  labelled images on which the dense and the pruned model are compared
    search      what was tried to find `recipe`, for the report
    sample_images  so many of the evaluation (or else calibration) images are put into the artefact and its report
    command     how to do it again, for the report

    The same input, recipe and seed give the same bytes, but for the reports, which hold measured times. Raises
    SsmpruneError; `out` is then as it was before.
    """
    checkpoint.check_writable(out, overwrite=overwrite)
    target = resolve_device(device)
    model = source.load().to(target)
    dense = figures(model)
    warnings: list[str] = []
    pruning = recipe.pruning
    alignment = choose_alignment(pruning.alignment, pruning.reduction, calibrated=calib is not None)
    if calib is None:
        warnings.append(f"Nothing was calibrated: no calibration images were given. Alignment is {alignment!r}.")
    images = None
    if calib is not None:
        images = calibration_images(calib, recipe.calibration.images, recipe.calibration.seed)
        if len(images) < recipe.calibration.images:
            warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration images were found.")

    def calibration_batches(dataset: ImageDataset) -> Iterator[Tensor]:
        done = progress("Calibrating") if progress else None
        seen = 0
        for batch in batches(dataset, model.preprocessing, recipe.calibration.batch_size):
            yield batch.images.to(target)
            seen += len(batch.images)
            if done:
                done(seen, len(dataset))

    seen = compress(
        model,
        **_arguments(recipe),
        alignment=alignment,
        calibration=calibration_batches(images) if images is not None else None,
    )
    reference = source.load().to(target)
    restore(reference)
    result = None
    if evaluation is not None:
        done = progress("Evaluating") if progress else None
        result = evaluate(model, evaluation, compare=reference, device=str(target), progress=done)
    done = progress("Timing") if progress else None
    speed = speed_facts(reference, model, str(target), done)
    chosen = evaluation if evaluation is not None else images
    assert isinstance(model.pruner, TokenPruner)
    left = model.pruner.settings.schedule.patches_per_block(model.stages)
    drops = any(count < stage.num_patches for stage in model.stages for count in left[stage.start : stage.stop])
    shown, files = samples(model, reference, chosen, sample_images, target) if chosen and drops else ((), {})
    provenance = {
        "calibration_images": seen.images if seen else 0,
        "calibration_sha256": fingerprint(images) if images is not None else None,
    }
    report = _report(source, model, recipe, dense, provenance).model_copy(
        update={
            **({result.task.section: result.comparison} if result else {}),
            "speed": speed,
            "calibration": calibration_facts(seen) if seen else None,
            "search": search,
            "samples": shown,
            "warnings": tuple(warnings),
        }
    )
    report = _judged(report, limits)
    assert report.pruning is not None
    final = recipe.resolved(report.pruning.model_dump(mode="json"), report.provenance)
    if command:
        report = report.model_copy(update={"provenance": {**report.provenance, "command": command}})
    contents: dict[str, bytes | str] = {
        "recipe.yaml": final.to_yaml(),
        **files,
        **report_files(report, files),
    }
    if seen is not None:
        points = [point.to_dict() for point in seen.points]
        contents["calibration.json"] = json.dumps({"images": seen.images, "points": points}, indent=1) + "\n"
    checkpoint.save(out, model.cpu(), contents, overwrite=overwrite)
    return report


def _judged(report: Report, limits: Limits) -> Report:
    """With a verdict on every limit whose value is in `report`."""
    task, dense, pruned, speed = TASKS.get(report.task), report.dense, report.pruned, report.speed
    compared = task.facts(report)
    assert pruned is not None
    verdicts = limits.check(
        task,
        score=None if compared is None else task.pruned(compared),
        comparison=compared,
        flops=pruned.multiply_adds_all_directions / dense.multiply_adds_all_directions,
        latency_ratio=None if speed is None else Estimate(speed.latency_ratio),
    )
    return report.model_copy(update={"limits": verdicts})


def _arguments(recipe: Recipe) -> dict[str, Any]:
    pruning = recipe.pruning
    return {
        "keep": pruning.keep,
        "tokens": pruning.tokens,
        "points": pruning.points,
        "importance": pruning.importance,
        "reduction": pruning.reduction,
        "seed": recipe.seed,
    }


def _report(source: Source, model: Backbone, recipe: Recipe, dense: Figures, provenance: dict[str, Any]) -> Report:
    """What is known before anything is measured."""
    assert isinstance(model.pruner, TokenPruner)
    return Report(
        family=model.family,
        task=model.task,
        image_size=model.image_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruning=pruning_facts(model.pruner, recipe.pruning.keep),
        dense=dense,
        pruned=figures(model),
        provenance={
            "input": source.path.name,
            "input_sha256": checkpoint.sha256(source.path),
            **versions(next(model.parameters()).device),
            **provenance,
        },
    )
