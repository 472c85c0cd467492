"""`ssmprune compress`: load, calibrate, prune, measure before and after, write the artefact."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import batches, calibration_images, fingerprint
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.kernels import active_backend, refused_backends
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.pruning import Calibration, TokenPruner, choose_alignment, compress, restore
from ssmprune_cli.recipe import Recipe
from ssmprune_cli.report import Figures, Report
from ssmprune_cli.workflows.evaluate import Evaluation, evaluate
from ssmprune_cli.workflows.flops import count_flops
from ssmprune_cli.workflows.model_card import model_card
from ssmprune_cli.workflows.profile import resolve_device, tokens_per_block

Progress = Callable[[str], Callable[[int, int], None]]  # what is being done -> (done, total) callback


@dataclass(frozen=True)
class Source:
    """The checkpoint to compress, and how to read it (see `checkpoint.load`)."""

    path: Path
    family: str | None = None
    variant: str | None = None
    weights: str = "model"
    image_size: int | None = None

    def load(self) -> Backbone:
        return checkpoint.load(
            self.path,
            family=self.family,
            variant=self.variant,
            weights=self.weights,
            image_size=self.image_size,
        )


def plan(source: Source, recipe: Recipe) -> Report:
    """What `compress_checkpoint` would do, without reading images or writing: tokens per block and multiply-adds."""
    model = source.load()
    dense = _figures(model)
    pruning = recipe.pruning
    # Every alignment source costs the same, so an uncalibrated one stands in for the calibrated one.
    alignment = "auto" if pruning.alignment == "calibrated" else pruning.alignment
    compress(model, **_arguments(recipe), alignment=alignment)
    return _report(source, model, recipe, dense, warnings=[])


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
    extra_files: Mapping[str, str] | None = None,
) -> Report:
    """Compress `source` by `recipe` and write the artefact folder `out` atomically.

    calib       unlabelled calibration images: a folder, an ImageFolder tree or an .npz
    evaluation  labelled images on which the dense and the pruned model are compared
    extra_files further files of the artefact, name to text

    The same input, recipe and seed give the same bytes. Raises SsmpruneError; `out` is then as it was before.
    """
    checkpoint.check_writable(out, overwrite=overwrite)
    target = resolve_device(device)
    model = source.load().to(target)
    dense = _figures(model)
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
    result = None
    if evaluation is not None:
        reference = source.load().to(target)
        restore(reference)
        result = evaluate(
            model,
            evaluation,
            compare=reference,
            device=str(target),
            progress=progress("Evaluating") if progress else None,
        )
    digest = fingerprint(images) if images is not None else None
    report = _report(source, model, recipe, dense, warnings, seen, digest, result)
    final = recipe.resolved(report.pruning, report.provenance)
    files = {
        **(extra_files or {}),
        "recipe.yaml": final.to_yaml(),
        "report.json": report.to_json(),
        "README.md": model_card(report, source.path.name),
    }
    if seen is not None:
        points = [point.to_dict() for point in seen.points]
        files["calibration.json"] = json.dumps({"images": seen.images, "points": points}, indent=1) + "\n"
    checkpoint.save(out, model.cpu(), files, overwrite=overwrite)
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


def _figures(model: Backbone) -> Figures:
    count = count_flops(model)
    return Figures(
        multiply_adds_all_directions=count.all_directions,
        multiply_adds_one_direction=count.one_direction,
        tokens_per_block=list(tokens_per_block(model)),
        multiply_adds_per_block=list(count.per_block),
    )


def _report(
    source: Source,
    model: Backbone,
    recipe: Recipe,
    dense: Figures,
    warnings: list[str],
    calibration: Calibration | None = None,
    calibration_digest: str | None = None,
    evaluation: Evaluation | None = None,
) -> Report:
    assert isinstance(model.pruner, TokenPruner)
    settings = model.pruner.settings
    return Report(
        family=model.family,
        image_size=list(model.image_size),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        pruning={
            "points": list(settings.schedule.points),
            "keep": recipe.pruning.keep,
            "tokens": list(settings.schedule.tokens),
            "importance": settings.importance,
            "reduction": settings.reduction,
            "alignment": settings.alignment,
        },
        dense=dense,
        pruned=_figures(model),
        accuracy=_accuracy(evaluation) if evaluation else None,
        calibration=_calibration(calibration) if calibration else None,
        warnings=warnings,
        provenance={
            "input": source.path.name,
            "input_sha256": checkpoint.sha256(source.path),
            "ssmprune": ssmprune_cli.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "backend": active_backend(),
            "backends_refused": refused_backends(),
            "calibration_images": calibration.images if calibration else 0,
            "calibration_sha256": calibration_digest,
        },
    )


def _accuracy(evaluation: Evaluation) -> dict[str, Any]:
    """Without the measured speeds, which would make two equal runs differ."""
    figures = evaluation.to_dict()
    del figures["images_per_second"], figures["dense"]["images_per_second"]
    return figures


def _calibration(calibration: Calibration) -> dict[str, Any]:
    points = [point.to_dict() for point in calibration.points]
    for point in points:
        del point["kept_positions"]  # in calibration.json
    return {"images": calibration.images, "points": points}
