"""The feature pyramid: every map also sees what coarser ones saw. Lin et al., arXiv 1612.03144; mmdet 3.3.0 (FPN)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.models.heads.mask_rcnn.layers import Convolution


class FeaturePyramid(nn.Module):
    """Maps of `in_channels` to as many levels of `channels`, and one more of half the size of the last."""

    def __init__(self, in_channels: Sequence[int], channels: int, *, normed: bool) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(Convolution(dim, channels, 1, normed=normed) for dim in in_channels)
        self.fpn_convs = nn.ModuleList(Convolution(channels, channels, 3, normed=normed) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, C_i, h_i, w_i), the finest first, to levels (B, channels, h_i, w_i) and the one more."""
        sums = [lateral(each) for lateral, each in zip(self.lateral_convs, features, strict=True)]
        for finer in range(len(sums) - 2, -1, -1):
            coarser = functional.interpolate(sums[finer + 1], size=sums[finer].shape[2:], mode="nearest")
            sums[finer] = sums[finer] + coarser
        levels = [conv(each) for conv, each in zip(self.fpn_convs, sums, strict=True)]
        return (*levels, levels[-1][:, :, ::2, ::2])
