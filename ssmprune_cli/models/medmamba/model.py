"""MedMamba: arXiv 2403.03849, YubiaoYue/MedMamba at 104beb3, with the authors' parameter names.

Stages as VMamba's (v0); in each block one half of the channels goes through convolutions, the other through four scans.
The convolutions are 3x3 over all channels, so they run on the whole grid: a dropped token is in it as it left, and the
block's output there is not kept. Letters: B batch, L tokens now, d model width of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import Block, ImageConfig, Places, check_size
from ssmprune_cli.models.vmamba import DownsampleV1, StagedBackbone, VMambaMixer
from ssmprune_cli.preprocessing import Interpolation, Triple
from ssmprune_cli.tokens import Dropped, TokenSequence, gather_tokens

PATCH = 4  # pixels
HALF: Triple = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class MedMambaConfig(ImageConfig):
    """Everything that defines a MedMamba. An int for `image_size` is a square. UsageError for what does not fit.

    The authors resize both sides of an image to the model's, bilinearly.

    embed_dim    width of the first stage; every later stage doubles it
    depths       blocks of each stage
    """

    image_size: tuple[int, int] = (224, 224)
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 4, 2)
    num_classes: int = 6
    d_state: int = 16
    eval_crop_ratio: float | None = field(default=1.0, kw_only=True)
    interpolation: Interpolation = field(default="bilinear", kw_only=True)
    mean: Triple = field(default=HALF, kw_only=True)
    std: Triple = field(default=HALF, kw_only=True)
    squeeze: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        object.__setattr__(self, "image_size", (given, given) if isinstance(given, int) else tuple(given))
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.embed_dim < 2 or self.embed_dim % 2:
            raise UsageError(f"embed_dim must be even, not {self.embed_dim}")
        if not self.depths or min(self.depths) < 1:
            raise UsageError(f"every stage needs a block: depths {self.depths}")
        if min(self.d_state, self.num_classes) < 1:
            raise UsageError("d_state and num_classes must be at least 1")
        size: tuple[int, ...] = self.image_size
        if len(size) != 2 or any(side < 1 or side % self.pixels for side in size):
            raise UsageError(
                f"an image of size {size} is not divided by {self.pixels}: a downsampling would leave out "
                "its last row or column"
            )

    def without_blocks(self, count: int) -> MedMambaConfig:
        depths = list(self.depths)
        depths[depths.index(max(depths))] -= count
        return replace(self, depths=tuple(depths))

    @property
    def pixels(self) -> int:
        """Of an image's side, to one place of the last stage."""
        return PATCH << (len(self.depths) - 1)

    def width(self, stage: int) -> int:
        return self.embed_dim << stage


class PatchEmbed2D(nn.Module):
    """4x4 patches that do not overlap, normalised."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, rows, columns, d)."""
        embedded: Tensor = self.norm(self.proj(images).permute(0, 2, 3, 1))
        return embedded


class ConvBranch(nn.ModuleDict):
    """Two 3x3 convolutions and a 1x1 one, each with a ReLU behind it; keys are places in the authors' Sequential."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            {
                "0": nn.BatchNorm2d(dim),
                "1": nn.Conv2d(dim, dim, 3, padding=1),
                "2": nn.BatchNorm2d(dim),
                "4": nn.Conv2d(dim, dim, 3, padding=1),
                "5": nn.BatchNorm2d(dim),
                "7": nn.Conv2d(dim, dim, 1),
            }
        )
        for layer in self.values():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """(B, d / 2, rows, columns) to the same."""
        x = functional.relu(self["2"](self["1"](self["0"](image))))
        x = functional.relu(self["5"](self["4"](x)))
        return functional.relu(self["7"](x))


class MedMambaBlock(Block):
    """Tokens plus the shuffled channels of both halves ("SS_Conv_SSM")."""

    def __init__(self, config: MedMambaConfig, dim: int) -> None:
        super().__init__()
        half = dim // 2
        self.ln_1 = nn.LayerNorm(half)
        self.self_attention = VMambaMixer(
            half,
            d_inner=2 * half,
            d_state=config.d_state,
            dt_rank=math.ceil(half / 16),
            gated=True,
            conv_bias=True,
        )
        self.self_attention.d_model = dim  # it sees half of a token
        self.conv33conv33conv11 = ConvBranch(half)

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        frozen, context = self._scanned(sequence.frozen), self._scanned(sequence.context)
        right = self.ln_1(sequence.hidden.chunk(2, dim=-1)[1])
        mixed, statistics = self.self_attention(
            right, sequence, sequence.patch_grid, alignment, wanted, frozen, context
        )
        halves = torch.stack((self._convolved(sequence), self.drop(mixed)), dim=-1)  # (B, L, d / 2, 2)
        return replace(sequence, hidden=sequence.hidden + halves.flatten(2)), statistics

    def _convolved(self, sequence: TokenSequence) -> Tensor:
        """(B, L, d / 2): what the convolutions over the whole grid leave at the tokens' places."""
        left = sequence.restored().hidden.chunk(2, dim=-1)[0]
        image = left.transpose(1, 2).unflatten(2, sequence.patch_grid)
        convolved: Tensor = self.conv33conv33conv11(image).flatten(2).transpose(1, 2)
        return convolved if sequence.is_dense else gather_tokens(convolved.contiguous(), sequence.positions)

    def _scanned(self, dropped: Dropped | None) -> Tensor | None:
        """The normalised half of dropped tokens that the scans see."""
        if dropped is None:
            return None
        normalised: Tensor = self.ln_1(dropped.stream.chunk(2, dim=-1)[1].to(self.ln_1.weight.dtype))
        return normalised


class MedMambaStage(nn.Module):
    """The blocks of a stage, and the downsampling after them; the last stage has none."""

    def __init__(self, config: MedMambaConfig, number: int) -> None:
        super().__init__()
        dim = config.width(number)
        self.blocks = nn.ModuleList(MedMambaBlock(config, dim) for _ in range(config.depths[number]))
        self.downsample = DownsampleV1(dim, 2 * dim) if number + 1 < len(config.depths) else None


class MedMamba(StagedBackbone):
    """See MedMambaConfig. There is no norm in front of the head."""

    family = "medmamba"

    def __init__(self, config: MedMambaConfig) -> None:
        super().__init__()
        self.config: MedMambaConfig = config
        self.patch_embed = PatchEmbed2D(config.embed_dim)
        self.layers = nn.ModuleList(MedMambaStage(config, number) for number in range(len(config.depths)))
        self.head = nn.Linear(config.width(len(config.depths) - 1), config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        check_size(images, self.image_size)
        *_, whole = self._stages(images)
        return self.classify(whole.mean(whole.hidden), whole.readout)

    @property
    def output_layer(self) -> nn.Linear:
        return self.head

    @property
    def mixers(self) -> Mixers:
        return [block.self_attention for block in self.blocks]  # type: ignore[misc]

    @property
    def places(self) -> Places:
        return Places(
            before=("patch_embed",),
            after=("head",),
            undecayed=("A_logs", "dt_projs_bias"),
            decayed=("x_proj_weight", "dt_projs_weight"),
            between={f"layers.{number}.downsample": stage.stop for number, stage in enumerate(self.stages[:-1])},
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.image_size[0] // PATCH, self.image_size[1] // PATCH
