"""MambaVision: arXiv 2407.08083, checkpoints of NVlabs/MambaVision 7860a50, with the authors' parameter names.

Written from the paper and the layout of the checkpoints, without the authors' code. Two levels of convolutions see the
whole image. In the next two a window is the whole grid: blocks with a scan, then as many with attention, both on the
tokens that are left. Before a downsampling and before the head the grid is made whole again: see vmamba/staged.py.
Letters: B batch, L tokens now, d model width of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.grids import Grid, divided
from ssmprune_cli.interface import Mixers, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import Block, ImageConfig, Places, check_size
from ssmprune_cli.models.mambavision.mixers import AttentionMixer, CentredMixer
from ssmprune_cli.models.vmamba import MLP, StagedBackbone
from ssmprune_cli.tokens import TokenSequence

CONVOLVED = 2  # levels of convolutions
STEM_EPS = 1e-4  # of the stem's norms


@dataclass(frozen=True)
class MambaVisionConfig(ImageConfig):
    """Everything that defines a MambaVision. An int for `image_size` is a square. UsageError for what does not fit.

    in_dim       channels after the first convolution
    embed_dim    width of the first level; every later level doubles it
    depths       blocks of each of the four levels; in the last two the first half, rounded up, has scans
    num_heads    of the attention in each level; the first two have none
    mlp_ratio    hidden channels of the MLP for each channel of the width
    layer_scale  start of the factors of each branch; None for none
    """

    image_size: tuple[int, int] = (224, 224)
    in_dim: int = 32
    embed_dim: int = 80
    depths: tuple[int, ...] = (1, 3, 8, 4)
    num_heads: tuple[int, ...] = (2, 4, 8, 16)
    num_classes: int = 1000
    d_state: int = 8
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    eval_crop_ratio: float | None = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        object.__setattr__(self, "image_size", (given, given) if isinstance(given, int) else tuple(given))
        for name in ("depths", "num_heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise UsageError(f"each of four levels needs a block: depths {self.depths}")
        if min(self.in_dim, self.embed_dim, self.d_state, self.num_classes) < 1 or self.mlp_ratio <= 0:
            raise UsageError("in_dim, embed_dim, d_state, num_classes and mlp_ratio must be positive")
        if len(self.num_heads) != 4 or any(
            heads < 1 or self.width(level) % heads for level, heads in list(enumerate(self.num_heads))[CONVOLVED:]
        ):
            raise UsageError(f"heads {self.num_heads} do not divide the widths of four levels")
        size: tuple[int, ...] = self.image_size
        if len(size) != 2 or min(size) < 1:
            raise UsageError(f"an image of size {size} has no pixel")

    def without_blocks(self, count: int) -> MambaVisionConfig | None:
        """None: a level's blocks with scans are half of it, so that without its last ones it is another model."""
        return None

    def width(self, level: int) -> int:
        return self.embed_dim << level

    def grid(self, level: int) -> Grid:
        """Rows and columns of a level. In the last two, one window."""
        grid: Grid = self.image_size
        for _ in range(level + 2):
            grid = divided(grid, 2)
        return grid


class PatchEmbed(nn.Module):
    """Two 3x3 convolutions with stride 2, each with a norm and a ReLU."""

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        self.conv_down = nn.Sequential(
            nn.Conv2d(3, config.in_dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(config.in_dim, eps=STEM_EPS),
            nn.ReLU(),
            nn.Conv2d(config.in_dim, config.embed_dim, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(config.embed_dim, eps=STEM_EPS),
            nn.ReLU(),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, d, H / 4, W / 4), rounded up."""
        embedded: Tensor = self.conv_down(images)
        return embedded


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with norms, added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(dim)

    def forward(self, image: Tensor) -> Tensor:
        """(B, d, rows, columns) to the same."""
        x = functional.gelu(self.norm1(self.conv1(image)), approximate="tanh")
        mixed: Tensor = self.norm2(self.conv2(x))
        return image + mixed


class Downsample(nn.Module):
    """One overlapping 3x3 convolution with stride 2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, columns, d) to half as many rows and columns, rounded up, of twice the width."""
        reduced: Tensor = self.reduction(x.permute(0, 3, 1, 2))
        return reduced.permute(0, 2, 3, 1)


class ConvLevel(nn.Module):
    """Blocks of convolutions, and the downsampling after them."""

    def __init__(self, config: MambaVisionConfig, number: int) -> None:
        super().__init__()
        dim = config.width(number)
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(config.depths[number]))
        self.downsample = Downsample(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, columns, d) to half as many rows and columns, rounded up, of twice the width."""
        image = x.permute(0, 3, 1, 2)
        for block in self.blocks:
            image = block(image)
        reduced: Tensor = self.downsample(image.permute(0, 2, 3, 1))
        return reduced


class MambaVisionBlock(Block):
    """Tokens plus the mixer of their norm, plus the MLP of their norm, each times a factor for its channel."""

    def __init__(self, config: MambaVisionConfig, dim: int, mixer: CentredMixer | AttentionMixer) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(config.mlp_ratio * dim))
        for name in ("gamma_1", "gamma_2"):
            scale = None if config.layer_scale is None else nn.Parameter(torch.full((dim,), config.layer_scale))
            self.register_parameter(name, scale)

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        frozen, context = (
            None if dropped is None else self.norm1(dropped.stream.to(self.norm1.weight.dtype))
            for dropped in (sequence.frozen, sequence.context)
        )
        normalised = self.norm1(sequence.hidden)
        mixed, statistics = self.mixer(normalised, sequence, alignment, wanted, frozen, context)
        hidden = sequence.hidden + self.drop(mixed if self.gamma_1 is None else self.gamma_1 * mixed)
        mlp = self.mlp(self.norm2(hidden))
        hidden = hidden + self.drop(mlp if self.gamma_2 is None else self.gamma_2 * mlp)
        return replace(sequence, hidden=hidden), statistics


class MixedLevel(nn.Module):
    """Blocks with a scan, then blocks with attention, and the downsampling after them; the last level has none."""

    def __init__(self, config: MambaVisionConfig, number: int) -> None:
        super().__init__()
        dim, depth = config.width(number), config.depths[number]
        scanned = (depth + 1) // 2
        mixers: list[CentredMixer | AttentionMixer] = [CentredMixer(dim, config.d_state) for _ in range(scanned)]
        mixers += [AttentionMixer(dim, config.num_heads[number]) for _ in range(depth - scanned)]
        self.blocks = nn.ModuleList(MambaVisionBlock(config, dim, mixer) for mixer in mixers)
        self.downsample = Downsample(dim) if number + 1 < len(config.depths) else None


class MambaVision(StagedBackbone):
    """See MambaVisionConfig."""

    family = "mambavision"

    def __init__(self, config: MambaVisionConfig) -> None:
        super().__init__()
        self.config: MambaVisionConfig = config
        self.patch_embed = PatchEmbed(config)
        levels: list[nn.Module] = [ConvLevel(config, number) for number in range(CONVOLVED)]
        levels += [MixedLevel(config, number) for number in range(CONVOLVED, len(config.depths))]
        self.levels = nn.ModuleList(levels)
        dim = config.width(len(config.depths) - 1)
        self.norm = nn.BatchNorm2d(dim)
        self.head = nn.Linear(dim, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed(self, images: Tensor) -> Tensor:
        x: Tensor = self.patch_embed(images).permute(0, 2, 3, 1)
        for level in self.levels[:CONVOLVED]:
            x = level(x)
        return x

    @property
    def scanned_layers(self) -> Sequence[Any]:
        return list(self.levels)[CONVOLVED:]

    def forward(self, images: Tensor) -> Tensor:
        check_size(images, self.image_size)
        *_, whole = self._stages(images)
        normalised = self.norm(whole.hidden.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)  # (B, L, d)
        return self.classify(whole.mean(normalised), whole.readout)

    @property
    def output_layer(self) -> nn.Linear:
        return self.head

    @property
    def mixers(self) -> Mixers:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    @property
    def places(self) -> Places:
        return Places(
            before=("patch_embed", *(f"levels.{number}" for number in range(CONVOLVED))),
            after=("norm", "head"),
            undecayed=("A_log",),
            between={f"levels.{CONVOLVED}.downsample": self.stages[0].stop},
        )

    @property
    def grid(self) -> tuple[int, int]:
        return self.config.grid(CONVOLVED)
