"""`ssmprune export`: a checkpoint or an artefact as a file for other programs."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import batches, some_images
from ssmprune_cli.errors import UsageError
from ssmprune_cli.export import (
    TARGETS,
    Exported,
    How,
    check_int8,
    check_request,
    export,
    placed,
    quantised,
    refuse,
)
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, ClipPreprocessing, Preprocessing, Reading
from ssmprune_cli.report import LimitFacts
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.int8 import Int8Facts, Judged, check, measure
from ssmprune_cli.workflows.limits import Limits
from ssmprune_cli.workflows.write import check_place

_IMAGES = 8  # that a file of one batch size may be checked with; more say no more
_CALIBRATED = 64  # images that the scales of activations are found with
_AT_ONCE = 8  # of these
_PYRAMID = (
    "The file holds the detector's backbone and feature pyramid (outputs p2 to p6, strides 4 to 64): how many boxes "
    "there are depends on the image, and is left to the program that reads it."
)


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how.

    out    the file, or a folder in which it is called model
    batch  images in a batch; None is any number
    check  images to check the file with: a folder, a file or an .npz; random ones without
    opset  of ONNX; None is the target's choice
    int8   where the scales of 8-bit activations come from; None is a file in float
    calib  images that "static" finds them with
    data, dataset, limit   labelled images that a file in int8 is judged on, their kind, and how many
    limits  on what that costs
    """

    path: Path
    out: Path
    target: str = "onnx"
    batch: int | None = None
    check: Path | None = None
    opset: int | None = None
    reading: Reading = NOTHING_SAID
    int8: How | None = None
    calib: Path | None = None
    data: Path | None = None
    dataset: str | None = None
    limit: int | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def file(self) -> Path:
        suffix = TARGETS.get(self.target).suffix
        is_file = self.out.suffix in {target.suffix for _, target in TARGETS.items()} and not self.out.is_dir()
        return self.out if is_file else self.out / f"model{suffix}"


@dataclass(frozen=True)
class ExportResult:
    """The file, what int8 costs and saves if it is in int8, and a verdict for every limit: a file that breaks one is
    not kept. `remarks` are sentences on what the file leaves out."""

    exported: Exported
    remarks: tuple[str, ...] = ()
    int8: Int8Facts | None = None
    verdicts: tuple[LimitFacts, ...] = ()
    kept: bool = True

    def to_dict(self) -> dict[str, Any]:
        found = {**self.exported.to_dict(), "kept": self.kept}
        if self.int8 is not None:
            found["int8"] = self.int8.to_dict()
            found["limits"] = [each.model_dump(mode="json") for each in self.verdicts]
        return found


def run(request: ExportRequest) -> ExportResult:
    """See `export`, and `quantised` for int8. Whatever can be refused is refused before the model is traced."""
    check_request(request.file, request.target, request.batch, request.opset)
    _check_options(request)
    check_place(request.file)
    model = checkpoint.load_as(request.path, request.reading)
    refuse(model, request.target)
    if request.int8 is not None and model.task == "detection":
        raise UsageError("a detector's file has no answers by which int8 could be judged", where="--int8")
    if request.int8 is not None and model.eight_bit_kinds:
        raise UsageError(
            f"the weights of {', '.join(model.eight_bit_kinds)} are in eight bits already, and so they are in the file",
            where="--int8",
            hint="Leave it out.",
        )
    count = min(max(request.batch or 0, 3), _IMAGES)
    images = None if request.check is None else _images(model, request.check, count, "--check")
    if request.int8 is None:
        remarks = () if model.task != "detection" else (_PYRAMID,)
        return ExportResult(_export(request, model, request.file, images), remarks)
    calibration = None if request.calib is None else _images(model, request.calib, _CALIBRATED, "--calib")
    judged = None if request.data is None else _judged(model, request)
    with placed(request.file) as temporary, TemporaryDirectory(prefix=".ssmprune-", dir=temporary.parent) as scratch:
        plain = _export(request, model, Path(scratch) / f"model{temporary.suffix}", images)
        if calibration is not None:
            shown, name = calibration, "--calib"
        elif images is not None:
            shown, name = images, "--check"
        else:
            shown, name = model.example(_CALIBRATED, seed=0), "random"
        most = max(each.batch for each in plain.checks)
        parts = () if calibration is None else _filled(calibration, request.batch or 1).split(request.batch or _AT_ONCE)
        made, products = quantised(plain, temporary, request.int8, model, _filled(shown, most), name, parts)
        facts = measure(plain, made, products, request.int8, shown, name, judged)
        verdicts = check(facts, request.limits)
        if kept := all(each.holds for each in verdicts):
            record = TARGETS.get(request.target).record
            assert record is not None
            told = facts.to_dict()
            del told["int8_bytes"]  # a file's own size changes with what it says
            record(temporary, "int8_cost", json.dumps(told))
            size = temporary.stat().st_size
            made, facts = replace(made, size=size), replace(facts, int8_bytes=size)
            temporary.replace(request.file)
        return ExportResult(replace(made, path=request.file), kept=kept, int8=facts, verdicts=verdicts)


def _export(request: ExportRequest, model: Backbone, path: Path, images: Tensor | None) -> Exported:
    return export(model, path, request.target, request.batch, images=images, opset=request.opset, source=request.path)


def _check_options(request: ExportRequest) -> None:
    """UsageError for options that say nothing without others, or do not fit each other."""
    if request.int8 is not None:
        check_int8(request.target, request.int8, calibrated=request.calib is not None)
    if request.data is None:
        request.limits.require(("max_drop",), "--data, the images that it is about")
        for option, value in (("--dataset", request.dataset), ("--limit", request.limit)):
            if value is not None:
                raise UsageError("needs --data, the images that it is about", where=option)
    for option, images in (("--calib", request.calib), ("--data", request.data)):
        if images is not None and request.int8 is None:
            raise UsageError(
                "is for files in int8: one in float answers as the model, and is checked",
                where=option,
                hint="Add `--int8 static` or `--int8 dynamic`, or leave it out.",
            )


def _judged(model: Backbone, request: ExportRequest) -> Judged:
    _way(model, "--data")
    assert request.data is not None
    task = TASKS.get(model.task)
    request.limits.fit(task)
    dataset = task.open(request.data, request.dataset)
    task.check(model, dataset)
    return Judged(task, dataset, request.limit)


def _filled(images: Tensor, batch: int) -> Tensor:
    """Images in whole batches, the first ones again where some are missing."""
    return images[torch.arange(-(-len(images) // batch) * batch) % len(images)]


def _images(model: Backbone, path: Path, count: int, option: str) -> Tensor:
    """(N, 3, H, W), prepared as the model expects."""
    way = _way(model, option)
    return torch.cat([each.images for each in batches(some_images(path, count, seed=0), way, count)])


def _way(model: Backbone, option: str) -> Preprocessing:
    """How images are prepared for a file of `model`. UsageError where they come in many sizes."""
    way = model.preprocessing
    if isinstance(way, ClipPreprocessing):
        raise UsageError(
            f"a file of a {model.family} takes clips, and is checked with random ones",
            where=option,
            hint="Leave it out.",
        )
    if not isinstance(way, Preprocessing):
        height, width = model.image_size
        raise UsageError(
            f"a file of a {model.family} takes images of {height} x {width} pixels, and its authors resize each image "
            "to a size of its own",
            where=option,
            hint="Leave it out: random images take the place of yours.",
        )
    return way
