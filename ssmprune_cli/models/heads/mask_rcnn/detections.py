"""What a detector says of an image."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, repr=False)
class Detections:
    """The objects in one image, best first. Sizes are those of the image as it was read.

    boxes   (N, 4) float32 left, top, right, bottom in pixels
    scores  (N,) float32 from 0 to 1
    labels  (N,) int64 number of the class, from 0 on
    masks   (N, H, W) bool: which pixels each object covers
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor

    def __repr__(self) -> str:
        best = f", best score {float(self.scores[0]):.3f}" if len(self.scores) else ""
        return f"Detections({len(self.scores)} objects{best})"
