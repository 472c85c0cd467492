"""`ssmprune export`: a checkpoint or an artefact as a file for other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli import checkpoint
from ssmprune_cli.data import batches, some_images
from ssmprune_cli.errors import UsageError
from ssmprune_cli.export import TARGETS, Exported, check_request, export, refuse
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, ClipPreprocessing, Preprocessing, Reading
from ssmprune_cli.workflows.write import check_place

_IMAGES = 8  # that a file of one batch size may be checked with; more say no more


@dataclass(frozen=True)
class ExportRequest:
    """What to export, and how.

    out    the file, or a folder in which it is called model
    batch  images in a batch; None is any number
    check  images to check the file with: a folder, a file or an .npz; random ones without
    opset  of ONNX; None is the target's choice
    """

    path: Path
    out: Path
    target: str = "onnx"
    batch: int | None = None
    check: Path | None = None
    opset: int | None = None
    reading: Reading = NOTHING_SAID

    @property
    def file(self) -> Path:
        suffix = TARGETS.get(self.target).suffix
        is_file = self.out.suffix in {target.suffix for _, target in TARGETS.items()} and not self.out.is_dir()
        return self.out if is_file else self.out / f"model{suffix}"


def run(request: ExportRequest) -> Exported:
    """See `export`. Whatever can be refused is refused before the model is traced."""
    check_request(request.file, request.target, request.batch, request.opset)
    check_place(request.file)
    model = checkpoint.load_as(request.path, request.reading)
    refuse(model, request.target)
    images = None if request.check is None else _images(model, request.check, request.batch)
    return export(
        model,
        request.file,
        request.target,
        request.batch,
        images=images,
        opset=request.opset,
        source=request.path,
    )


def _images(model: Backbone, path: Path, batch: int | None) -> Tensor:
    """(N, 3, H, W), prepared as the model expects."""
    way = model.preprocessing
    if isinstance(way, ClipPreprocessing):
        raise UsageError(
            f"a file of a {model.family} takes clips, and is checked with random ones",
            where="--check",
            hint="Leave it out.",
        )
    if not isinstance(way, Preprocessing):
        height, width = model.image_size
        raise UsageError(
            f"a file of a {model.family} takes images of {height} x {width} pixels, and its authors resize each image "
            "to a size of its own",
            where="--check",
            hint="Leave it out: the file is checked with random images.",
        )
    count = min(max(batch or 0, 3), _IMAGES)
    return torch.cat([each.images for each in batches(some_images(path, count, seed=0), way, count)])
