"""What a model expects of an image. Plain data: `ssmprune_cli.data` applies it, every model family states its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """Resize the short side to `resize` pixels, crop the centre `crop` x `crop`, scale to 0..1, normalise channels."""

    resize: int
    crop: int
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
