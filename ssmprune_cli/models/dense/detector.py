"""A detector: boxes, classes and masks of objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.dense.model import DenseModel
from ssmprune_cli.models.heads import Detections, MaskRCNN
from ssmprune_cli.preprocessing import Frame


class Detector(DenseModel):
    """What it computes of every image is a feature pyramid; `detect` goes on to the objects."""

    task = "detection"

    @property
    def strides(self) -> dict[str, int]:
        """Pixels between places of each level that `forward` gives, by the names of the paper, the finest first."""
        return {f"p{power}": 2**power for power in range(2, 7)}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        """Levels (B, C, h_i, w_i) of normalised images (B, 3, H, W) of one size, the finest first."""
        levels: tuple[Tensor, ...] = self.head(self.encoder.feature_maps(images))
        return levels

    def detect(self, images: Tensor, frames: Sequence[Frame]) -> list[Detections]:
        """The objects in each of `images` (B, 3, H, W), which `frames` tell from their padding, in original pixels."""
        return self.read(self(images), frames)

    def read(self, levels: Sequence[Tensor], frames: Sequence[Frame]) -> list[Detections]:
        """The objects in each image, of what `forward` gave. UsageError unless there is a frame for each image."""
        if len(frames) != len(levels[0]):
            raise UsageError(f"{len(levels[0])} images have {len(frames)} frames")
        return cast(MaskRCNN, self.head).detect(levels, frames)
