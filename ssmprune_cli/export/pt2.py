"""`torch.export`: a graph of one model at one batch size. It names our kernels, so it is loaded beside this package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli.export.target import ExportTarget
from ssmprune_cli.models import Backbone


def _missing() -> str | None:
    return None if find_spec("torch.export") else f"torch {torch.__version__} has no torch.export"


def _write(model: Backbone, path: Path, images: Tensor) -> None:
    torch.export.save(torch.export.export(model, (images,)), path)


def _compute(path: Path, images: Tensor) -> Tensor:
    logits: Tensor = torch.export.load(path).module()(images)
    return logits


PT2 = ExportTarget(".pt2", _missing, _write, _compute)
