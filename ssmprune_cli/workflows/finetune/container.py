"""The file of a segmenter that was trained from scratch, laid out as mmsegmentation lays its own out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmprune_cli.models import Segmenter
from ssmprune_cli.preprocessing import KeepRatio


def mm_container(model: Segmenter, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Weights in the names of the model, and what their shapes do not tell: a configuration in Python's text, of which
    a reader takes the images and the head."""
    head = model.config.head
    described = {"decode_head": {"type": "UPerHead", "pool_scales": head.pool_scales, "dropout_ratio": head.dropout}}
    text = f"test_pipeline = {_pipeline(model.preprocessing)}\nmodel = {described}\n"
    names = {"CLASSES": model.class_names} if model.class_names else {}
    return {"meta": {"config": text, **names}, "state_dict": dict(state)}


def _pipeline(images: KeepRatio) -> list[dict[str, Any]]:
    """How `images` are prepared, step by step."""
    mean, std = ([255 * value for value in values] for values in (images.mean, images.std))
    steps: list[dict[str, Any]] = [
        {"type": "LoadImageFromFile"},
        {"type": "Resize", "scale": (images.long, images.short), "keep_ratio": True},
        {"type": "Normalize", "mean": mean, "std": std, "to_rgb": images.channels == "rgb"},
    ]
    if images.divisor > 1:
        kind = "ResizeToMultiple" if images.fill == "resize" else "Pad"
        steps.append({"type": kind, "size_divisor": images.divisor})
    return [*steps, {"type": "PackSegInputs"}]
