"""A model as one graph of operators, for batches of one size or of any."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ssmprune_cli.models import Backbone, Detector

OLDEST = "2.8"  # version of torch: the first with `torch.onnx.ops`, and whose scan takes what we give it
INPUT, OUTPUT, BATCH = "images", "logits", "batch"  # names in a file

Answer = Tensor | tuple[Tensor, ...]


def too_old() -> str | None:
    """Why this torch cannot export; None if it can."""
    if torch.__version__ >= OLDEST:  # it compares as versions do
        return None
    return f"torch {torch.__version__} is too old, {OLDEST} is needed"


class _Named(torch.nn.Module):
    """The model, with its input by our name."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Answer:
        answer: Answer = self.model(images)
        return answer


def outputs_of(model: Backbone) -> tuple[str, ...]:
    """Names of what the graph of `model` computes: logits, or of a detector the levels of its feature pyramid."""
    return tuple(model.strides) if isinstance(model, Detector) else (OUTPUT,)


def parts(answer: Answer) -> tuple[Tensor, ...]:
    """What a graph computes, by the names of `outputs_of`."""
    return answer if isinstance(answer, tuple) else (answer,)


def traced(model: Backbone, images: Tensor, *, any_batch: bool) -> ExportedProgram:
    """The graph of `model` for images of this shape (B, 3, H, W), B being any number if `any_batch`.

    Not strict: what is traced are operators, not bytecode, so that whatever Python does between them does not matter.
    """
    shapes = {INPUT: {0: Dim(BATCH, min=1)} if any_batch else None}
    return torch.export.export(_Named(model), (images,), dynamic_shapes=shapes, strict=False)
