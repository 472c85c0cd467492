"""Classification of videos: the class of a clip, judged as that of an image. Of several views of a clip the mean of
their probabilities is judged, as in OpenGVLab/VideoMamba f3427e4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli.tasks.classification import Classification


class VideoClassification(Classification):
    """As Classification, on clips."""

    name = "video-classification"
    datasets = ("kinetics",)
    hub_task = "video-classification"
    clips = True
    cases = "clips"

    def kind(self, path: Path) -> str:
        return "kinetics"

    def answer(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """Logits (B, classes) of clips (B, 3, T, H, W); of views (B, views, 3, T, H, W) the logarithm of their mean
        probabilities. Views go through the model one by one, as many clips at a time as without."""
        if images.ndim == 5:
            return forward(images)
        shares = [forward(view).softmax(dim=1, dtype=torch.float64) for view in images.unbind(dim=1)]
        mean = torch.stack(shares).mean(dim=0)
        return mean.clamp(min=torch.finfo(mean.dtype).tiny).log()
