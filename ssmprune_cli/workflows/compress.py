"""`ssmprune compress`: load, calibrate, prune, measure before and after, write the artefact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset, batches, calibration_images, fingerprint
from ssmprune_cli.errors import MAX_MESSAGE, shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.pruning import TokenPruner, choose_alignment, compress, restore
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.report import Figures, Report, SearchTrial
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.identity import weights_sha256
from ssmprune_cli.workflows.measure import resolve_device
from ssmprune_cli.workflows.reporting import (
    accuracy_facts,
    calibration_facts,
    figures,
    pruning_facts,
    report_files,
    samples,
    speed_facts,
    versions,
)

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback


@dataclass(frozen=True)
class Source:
    """The checkpoint to compress, and how to read it."""

    path: Path
    reading: Reading = NOTHING_SAID

    def load(self) -> Backbone:
        """The dense model, also of an artefact that is compressed already."""
        return checkpoint.load_as(self.path, self.reading, dense=True)

    def warnings(self) -> list[str]:
        """What is to be known of the checkpoint before it is compressed."""
        if not checkpoint.is_compressed(self.path):
            return []
        return ["The input is compressed already: its dense weights are compressed anew, and compared with."]


def plan(source: Source, recipe: Recipe) -> Report:
    """What `compress_checkpoint` would do, without reading images or writing: tokens per block and multiply-adds."""
    model = source.load()
    dense = figures(model)
    pruning = recipe.pruning
    # Every alignment source costs the same, so an uncalibrated one stands in for the calibrated one.
    alignment = "auto" if pruning.alignment == "calibrated" else pruning.alignment
    compress(model, **_arguments(recipe), alignment=alignment)
    return _report(source, model, recipe, dense, {}).model_copy(update={"warnings": tuple(source.warnings())})


def compress_checkpoint(
    source: Source,
    recipe: Recipe,
    *,
    out: Path,
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
    warnings = source.warnings()
    pruning = recipe.pruning
    alignment = choose_alignment(pruning.alignment, pruning.reduction, calibrated=calib is not None)
    if calib is None:
        warnings.append(f"Nothing was calibrated: no calibration images were given. Alignment is {alignment!r}.")
    images = None
    if calib is not None:
        images = calibration_images(calib, recipe.calibration.images, recipe.calibration.seed)
        if len(images) < recipe.calibration.images:
            warnings.append(f"Only {len(images)} of {recipe.calibration.images} calibration images were found.")
        warnings += images.notes
    if evaluation is not None:
        warnings += evaluation.notes

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
    drawn, files = samples(model, reference, chosen, sample_images, target) if chosen and drops else ((), {})
    provenance = {
        "calibration_images": seen.images if seen else 0,
        "calibration_sha256": fingerprint(images) if images is not None else None,
    }
    report = _report(source, model, recipe, dense, provenance).model_copy(
        update={
            "accuracy": accuracy_facts(result) if result else None,
            "speed": speed,
            "calibration": calibration_facts(seen) if seen else None,
            "search": search,
            "samples": drawn,
            "warnings": tuple(dict.fromkeys(warnings)),  # of the same images the same is said
        }
    )
    assert report.pruning is not None
    final = recipe.resolved(report.pruning.model_dump(mode="json"), report.provenance)
    if command:
        report = report.model_copy(update={"provenance": {**report.provenance, "command": shown(command, MAX_MESSAGE)}})
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
        image_size=model.image_size,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruning=pruning_facts(model.pruner, recipe.pruning.keep),
        dense=dense,
        pruned=figures(model),
        provenance={
            "input": shown(source.path.name),
            "input_sha256": checkpoint.sha256(source.path),
            "weights_sha256": weights_sha256(model),
            **versions(next(model.parameters()).device),
            **provenance,
        },
    )
