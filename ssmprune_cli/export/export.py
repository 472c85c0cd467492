"""Write a model in the form of a target, and keep the file only if it computes what the model computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export.check import Check, agreement_of, compared, judge, recorded, tolerance_of
from ssmprune_cli.export.facts import facts
from ssmprune_cli.export.graph import outputs_of, traced
from ssmprune_cli.export.onnx import ONNX, ONNX_PLAIN
from ssmprune_cli.export.place import placed
from ssmprune_cli.export.pt2 import PT2
from ssmprune_cli.export.target import ExportTarget, Wanted
from ssmprune_cli.models import Backbone
from ssmprune_cli.registry import Registry

TARGETS: Registry[ExportTarget] = Registry("export target")
TARGETS.register("onnx", ONNX)
TARGETS.register("onnx-plain", ONNX_PLAIN)
TARGETS.register("pt2", PT2)

_CHECKED = (1, 3)  # sizes of the batches that a file for any is checked with


@dataclass(frozen=True)
class Exported:
    """A written file. `batch` is None for one that takes batches of any size; `images` are those of the check;
    `tolerance` is None where nothing was demanded of it."""

    path: Path
    target: str
    batch: int | None
    size: int
    images: str
    checks: tuple[Check, ...]
    tolerance: float | None

    @property
    def error(self) -> float:
        """The largest of all checks."""
        return max(check.error for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def refuse(model: Backbone, target: str) -> None:
    """UsageError, with the reason, for a model that `target` cannot hold: it is said before minutes of work."""
    if model.inputs == "text":
        raise UsageError(
            f"a {model.family} is not exported: it takes text",
            hint="Classifiers and segmenters of images are exported.",
        )
    dtypes = TARGETS.get(target).dtypes
    if dtypes and model.dtype not in dtypes:
        known = " or ".join(map(str, dtypes))
        raise UsageError(f"a file of the target {target!r} computes in {known}, and this model is in {model.dtype}")
    if model.num_classes < 1:
        raise UsageError(f"this {model.family} has no head, so there are no logits to export")


def check_request(path: Path, target: str, batch: int | None, opset: int | None) -> ExportTarget:
    """The target. Raises UsageError if it is unknown or cannot be written here, and for what does not fit it: a path
    of another suffix or that exists, a batch of no image, an opset that is not offered."""
    chosen = TARGETS.get(target)
    if batch is not None and batch < 1:
        raise UsageError(f"a batch has at least one image, not {batch}")
    if path.suffix != chosen.suffix:
        raise UsageError(f"a file of the target {target!r} has the suffix {chosen.suffix}", where=str(path))
    if path.exists():
        raise UsageError("exists already", where=str(path), hint="Delete it, or choose another name.")
    if opset is not None and chosen.opsets is None:
        raise UsageError(f"a file of the target {target!r} has no opset", where="--opset")
    if opset is not None and chosen.opsets is not None and not chosen.opsets[0] <= opset <= chosen.opsets[1]:
        raise UsageError(f"must be one from {chosen.opsets[0]} to {chosen.opsets[1]}, not {opset}", where="--opset")
    reason = chosen.missing()
    if reason is not None:
        raise UsageError(f"the target {target!r} cannot be written here: {reason}")
    return chosen


def export(
    model: Backbone,
    path: Path,
    target: str = "onnx",
    batch: int | None = None,
    *,
    images: Tensor | None = None,
    opset: int | None = None,
    source: Path | None = None,
) -> Exported:
    """Write `model`, dense or pruned, to `path`, for images of its size, dtype and device. Of a detector, its backbone
    and feature pyramid: the number of its boxes depends on the image.

    batch   images in a batch; None is any number
    images  (N, 3, H, W), normalised, that the file is checked with; random ones without
    opset   of ONNX; None is the target's choice
    source  the file or artefact that the model was read from, which the file then names

    The file is read back and run as its user will, on other images than those that it was made with. Raises UsageError
    for what `check_request` and `refuse` say; SsmpruneError if the model cannot be written in this form or the file
    computes something else. Then there is no file.
    """
    chosen = check_request(path, target, batch, opset)
    refuse(model, target)
    device = next(model.parameters()).device
    sizes = _CHECKED if batch is None else (batch,)
    random = torch.Generator().manual_seed(0)

    def noise(count: int) -> Tensor:
        return torch.randn(count, *model.input_shape, generator=random).to(device, model.dtype)

    shown = noise(max(sizes)) if images is None else _repeated(images.to(device, model.dtype), max(sizes))
    tolerance = tolerance_of(model)
    used = "random" if images is None else f"{min(len(images), max(sizes))} given"
    with placed(path) as temporary, evaluating(model), quiet():
        try:
            # A batch of one would be taken for a constant.
            graph = traced(model, noise(2 if batch is None else batch), any_batch=batch is None)
            chosen.write(graph, temporary, Wanted(opset, facts(model, target, source), outputs_of(model)))
            checks = compared(model, chosen.open(temporary), shown, sizes)
        except OSError:  # of the disk, not of the model
            raise
        except Exception as error:  # whatever an exporter raises of a model that it cannot take
            first = str(error).strip().partition("\n")[0]
            raise SsmpruneError(f"{model.family} cannot be exported to {target}: {first}", where=str(path)) from error
        judge(checks, target, path, tolerance, agreement_of(model))
        if chosen.record is not None:
            chosen.record(temporary, "check", recorded(checks, used, tolerance))
        temporary.replace(path)
    return Exported(path, target, batch, path.stat().st_size, used, checks, tolerance)


@contextmanager
def evaluating(model: Backbone) -> Iterator[None]:
    """Inside, the model is in evaluation mode, and nothing is recorded for gradients."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of what is old in themselves, and tell what they lack and which constants they do not fold."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "torch.onnx", None)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _repeated(images: Tensor, count: int) -> Tensor:
    """`count` images, the first ones again where there are fewer."""
    return images[torch.arange(count) % len(images)]
