"""UperNet's head: arXiv 1807.10221; as mmsegmentation 0.23.0 and 1.2.2 compute it (`UPerHead`), with their names.

The coarsest feature map is pooled to a few sizes, and what they say joins it (a pyramid pooling module). Then a feature
pyramid: every coarser level is added to the next finer one. All levels meet at the size of the finest.
Letters: B batch, C channels of the head, h and w rows and columns of the finest feature map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import CheckpointError, UsageError, listing


@dataclass(frozen=True, kw_only=True)
class UperNetConfig:
    """Everything that defines the head. Raises UsageError for what does not fit.

    in_channels  of the feature maps, the finest first
    channels     of the head; the authors' C
    num_classes  of the logits
    pool_scales  rows and columns that the coarsest map is pooled to
    dropout      share of channels that training leaves out before the classes
    """

    in_channels: tuple[int, ...]
    channels: int = 512
    num_classes: int = 150
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("in_channels", "pool_scales"):
            values = tuple(getattr(self, name))  # a list from JSON
            object.__setattr__(self, name, values)
            if not values or min(values) < 1:
                raise UsageError(f"{name} must be one or more numbers above 0, not {values}")
        if self.channels < 1 or self.num_classes < 1:
            raise UsageError("channels and num_classes must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be from 0 to below 1, not {self.dropout:g}")


class ConvNormReLU(nn.Module):
    """A convolution that keeps the size, a batch norm and a ReLU."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(out)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.bn(self.conv(x)))


class UperNet(nn.Module):
    """See UperNetConfig."""

    def __init__(self, config: UperNetConfig) -> None:
        super().__init__()
        self.config = config
        *finer, coarsest = config.in_channels
        width = config.channels
        # Index 1 of each is where the authors' weights are: pooling has none.
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvNormReLU(coarsest, width, 1)) for scale in config.pool_scales
        )
        self.bottleneck = ConvNormReLU(coarsest + len(config.pool_scales) * width, width, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(channels, width, 1) for channels in finer)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(width, width, 3) for _ in finer)
        self.fpn_bottleneck = ConvNormReLU(len(config.in_channels) * width, width, 3)
        self.conv_seg = nn.Conv2d(width, config.num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)  # type: ignore[arg-type]

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, num_classes, h, w) of feature maps (B, in_channels[i], h_i, w_i), the finest first."""
        features = self.features(maps)
        if self.training:
            features = functional.dropout2d(features, self.config.dropout)
        logits: Tensor = self.conv_seg(features)
        return logits

    def features(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classes are told from, (B, C, h, w)."""
        laterals = [conv(each) for conv, each in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.pooled(maps[-1]))
        for finer in range(len(laterals) - 2, -1, -1):
            laterals[finer] = laterals[finer] + resized(laterals[finer + 1], laterals[finer])
        levels = [conv(each) for conv, each in zip(self.fpn_convs, laterals[:-1], strict=True)]
        levels.append(laterals[-1])
        joined = torch.cat([levels[0], *(resized(each, levels[0]) for each in levels[1:])], dim=1)
        features: Tensor = self.fpn_bottleneck(joined)
        return features

    def pooled(self, coarsest: Tensor) -> Tensor:
        """The coarsest map (B, in_channels[-1], h, w) with what it says at every pooling size, (B, C, h, w)."""
        scales = [resized(module(coarsest), coarsest) for module in self.psp_modules]
        result: Tensor = self.bottleneck(torch.cat([coarsest, *scales], dim=1))
        return result


def resized(x: Tensor, like: Tensor) -> Tensor:
    """`x` at the rows and columns of `like`."""
    return functional.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


def configure_upernet(
    shapes: Mapping[str, tuple[int, ...]], pool_scales: tuple[int, ...] | None, dropout: float
) -> UperNetConfig:
    """The configuration of a head with these shapes. Nothing in them says `pool_scales`: None is the published ones.

    Raises CheckpointError for what is no such head, or where other scales would be needed than the published.
    """

    def shape(key: str) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != 4:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a head of UperNet: the weight {key} {problem}")
        return found

    levels = sum(key.startswith("lateral_convs.") and key.endswith(".conv.weight") for key in shapes)
    laterals = [shape(f"lateral_convs.{level}.conv.weight")[1] for level in range(levels)]
    pools = sum(key.startswith("psp_modules.") and key.endswith(".conv.weight") for key in shapes)
    scales = UperNetConfig.pool_scales if pool_scales is None else pool_scales
    if len(scales) != pools:
        raise CheckpointError(
            f"the head pools its features to {pools} sizes, and {'the file says' if pool_scales else 'published are'} "
            f"{listing(scales, 16)}"
        )
    classes, channels = shape("conv_seg.weight")[:2]
    return UperNetConfig(
        in_channels=(*laterals, shape("psp_modules.0.1.conv.weight")[1]),
        channels=channels,
        num_classes=classes,
        pool_scales=scales,
        dropout=dropout,
    )
