"""A segmenter: the class of every pixel."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ssmprune_cli.models.dense.model import DenseModel


class Segmenter(DenseModel):
    """Its head makes logits at the size of the finest feature map."""

    task = "segmentation"

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of normalised images (B, 3, H, W) of one size, which may be any."""
        logits: Tensor = self.head(self.encoder.feature_maps(images))
        return functional.interpolate(logits, size=images.shape[2:], mode="bilinear", align_corners=False)
