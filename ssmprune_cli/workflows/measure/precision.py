"""The precision that a model computes in."""

from __future__ import annotations

from typing import TypeVar

import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Model = TypeVar("Model", bound=Backbone)


def in_precision(model: Model, name: str) -> Model:
    """`model` itself, its weights in the precision called `name`. What it computes is in it too, but for the residual
    stream, the sums of products, norms and convolutions, and the scans' states, which are in fp32 at least.

    Raises UsageError for an unknown name.
    """
    if name not in PRECISIONS:
        raise UsageError(f"unknown precision {name!r}", hint=f"One of {', '.join(PRECISIONS)}.")
    return model.to(PRECISIONS[name])
