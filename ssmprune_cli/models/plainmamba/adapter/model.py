"""PlainMamba-Adapter: arXiv 2403.17695, ChenhongyiYang/PlainMamba at 0975a1d (downstream/mmdetection), with its names.

A PlainMamba keeps one grid of a stride of 16 pixels, and detectors want four. So plain convolutions (the *prior*) make
maps of four strides, and between runs of blocks both see each other. Each map that comes out is the prior's, plus the
backbone's grid at its size. Where the prior reads the grid, a dropped token has the value that it had when it left;
an injector adds to the tokens that are left.
Glossary: B batch, L tokens now, G places of the grid, C tokens of the prior, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.grids import Grid
from ssmprune_cli.models.common import Places
from ssmprune_cli.models.plainmamba.adapter.attention import DeformableAttention, grid_centres
from ssmprune_cli.models.plainmamba.adapter.interaction import MAPS, Interaction
from ssmprune_cli.models.plainmamba.adapter.prior import SpatialPrior
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig, Trunk
from ssmprune_cli.tokens import TokenSequence

STRIDE = 32  # of the coarsest map, in pixels: a smaller side would leave maps that do not lie on each other
PATCH = 16
_SCALES = (4.0, 2.0, 1.0, 0.5)  # by which the backbone's grid is resized for each map


@dataclass(frozen=True)
class AdapterConfig(PlainMambaConfig):
    """Everything that defines a PlainMamba-Adapter. There is no classifier, and no norm after the last block.

    prior_channels  of the prior's stem
    heads           of the attentions
    mlp_channels    hidden channels of the extractors' MLPs
    runs            how many blocks have passed after each run of them; the last number is `depth`
    """

    out_indices: tuple[int, ...] = ()
    num_classes: int = 0
    prior_channels: int = 64
    heads: int = 6
    mlp_channels: int = 48
    runs: tuple[int, ...] = (6, 12, 18, 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "runs", tuple(self.runs))
        if self.num_classes or self.out_indices or self.patch_size != PATCH:
            raise UsageError(f"a PlainMamba-Adapter has no classifier, its own outputs and patches of {PATCH} pixels")
        for name in ("prior_channels", "heads", "mlp_channels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.embed_dim % self.heads:
            raise UsageError(f"{self.embed_dim} channels are not divided among {self.heads} heads")
        runs = (0, *self.runs)
        if runs[-1] != self.depth or any(later <= former for former, later in pairwise(runs)):
            raise UsageError(f"runs must rise to the depth of {self.depth}, not {self.runs}")

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Of the feature maps."""
        return (self.embed_dim,) * len(_SCALES)


class AdapterTrunk(Trunk):
    """The weights that the authors' checkpoints hold under `backbone.`."""

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        dim, count = config.embed_dim, len(config.runs)
        self.level_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(MAPS, dim)))
        self.spm = SpatialPrior(config.prior_channels, dim)
        self.interactions = nn.ModuleList(
            Interaction(dim, config.heads, config.mlp_channels, last=number == count - 1) for number in range(count)
        )
        self.up = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        for number in range(1, len(_SCALES) + 1):
            self.add_module(f"ad_norm{number}", nn.BatchNorm2d(dim))


class PlainMambaAdapter(PlainMamba):
    """See AdapterConfig."""

    family = "plainmamba_adapter"
    config: AdapterConfig
    backbone: AdapterTrunk

    def __init__(self, config: AdapterConfig) -> None:
        super().__init__(config)
        for module in self.modules():
            if isinstance(module, DeformableAttention):
                module.reset_parameters()

    @staticmethod
    def make_trunk(config: Any) -> Trunk:
        return AdapterTrunk(config)

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, d, h, w) with strides of 4, 8, 16 and 32 pixels, at every place of the image.

        Raises DataError for images (B, 3, H, W) whose sides are no multiples of 32.
        """
        height, width = images.shape[2:] if images.ndim == 4 and images.shape[1] == 3 else (0, 0)
        if not height or not width or height % STRIDE or width % STRIDE:
            raise DataError(
                f"the model takes images (B, 3, H, W) whose sides are multiples of {STRIDE}, not {tuple(images.shape)}",
                hint="Pad the images with zeros on the right and below.",
            )
        trunk = self.backbone
        embedded, grid = trunk(images)
        finest, *maps = trunk.spm(images)
        grids: list[Grid] = [(each.shape[2], each.shape[3]) for each in maps]
        levels = [
            each.flatten(2).transpose(1, 2) + own for each, own in zip(maps, trunk.level_embed.unbind(), strict=True)
        ]
        sequence = TokenSequence.dense(embedded, grid=grid, restorable=True)
        sequence, prior = self._interact(sequence, torch.cat(levels, dim=1), grids)
        whole = sequence.restored()
        tokens = whole.spread(whole.hidden).transpose(1, 2).unflatten(2, grid)  # (B, d, rows, columns)
        parts = prior.transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
        maps = [part.unflatten(2, size) for part, size in zip(parts, grids, strict=True)]
        maps = [finest + trunk.up(maps[0]), *maps]
        return tuple(
            trunk.get_submodule(f"ad_norm{number}")(each + _resized(tokens, scale))
            for number, (each, scale) in enumerate(zip(maps, _SCALES, strict=True), start=1)
        )

    def _interact(self, sequence: TokenSequence, prior: Tensor, grids: Sequence[Grid]) -> tuple[TokenSequence, Tensor]:
        """The tokens after the last block, and the prior's (B, C, d) after the last extractor."""
        grid = sequence.patch_grid
        places, centres = grid_centres([grid], prior), grid_centres(grids, prior)
        start = 0
        for interaction, stop in zip(self.backbone.interactions, self.config.runs, strict=True):
            assert isinstance(interaction, Interaction)
            own = places if sequence.is_untouched else places[0][sequence.dense_positions()]  # (B or 1, L, 2)
            sequence = replace(sequence, hidden=interaction.injector(sequence.hidden, own, prior, grids))
            for block in range(start, stop):
                before, sequence = self.step(block, sequence)
            whole = before.restored()
            for extractor in interaction.extractors:
                prior = extractor(prior, centres, grids, whole.spread(whole.hidden), grid)
            start = stop
        return sequence, prior

    def forward(self, images: Tensor) -> Tensor:
        """(B, d): the mean of the coarsest map of normalised images (B, 3, H, W)."""
        return self.feature_maps(images)[-1].mean(dim=(2, 3))

    @property
    def places(self) -> Places:
        runs = (0, *self.config.runs)
        between: dict[str, int] = {}
        for number, (start, stop) in enumerate(pairwise(runs)):
            between[f"backbone.interactions.{number}.injector"] = start
            between[f"backbone.interactions.{number}.extractor"] = stop
        last = len(self.config.runs) - 1
        norms = tuple(f"backbone.ad_norm{number}" for number in range(1, len(_SCALES) + 1))
        return Places(
            before=("backbone.patch_embed", "backbone.pos_embed", "backbone.spm", "backbone.level_embed"),
            after=(f"backbone.interactions.{last}.extra_extractors", "backbone.up", *norms),
            undecayed=("pos_embed", "A_log", "level_embed"),
            decayed=("direction_Bs",),
            between=between,
        )


def _resized(tokens: Tensor, scale: float) -> Tensor:
    """`tokens` (B, d, rows, columns) at another size, bilinear."""
    if scale == 1:
        return tokens
    return functional.interpolate(tokens, scale_factor=scale, mode="bilinear", align_corners=False)
