"""EfficientVMamba: arXiv 2403.09977, TerryPei/EfficientVMamba at 0bc5ee2, with the authors' parameter names.

The first two stages are VMamba's, with a small convolution beside the scans of each block; the last two have
convolutions alone, and no tokens are dropped there. Convolutions run on the whole grid: a dropped token is in it as it
left. Letters: B batch, L tokens now, d model width of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import GATE_REDUCTION, Block, ChannelGate, ImageConfig, Places, check_size
from ssmprune_cli.models.efficientvmamba.mixer import AtrousMixer
from ssmprune_cli.models.vmamba import DownsampleV1, PatchEmbedV1, StagedBackbone, next_stage
from ssmprune_cli.tokens import TokenSequence, gather_tokens

SCANNED = 2  # stages whose blocks have scans
PIXELS = 16  # that divide an image's side: every scan visits a quarter of the grid
EXPANSION = 4  # of the channels in the blocks of convolutions


@dataclass(frozen=True)
class EfficientVMambaConfig(ImageConfig):
    """Everything that defines an EfficientVMamba. An int for `image_size` is a square. UsageError if it cannot be.

    embed_dim  width of the first stage; every later stage doubles it
    depths     blocks of each of the four stages
    ssm_ratio  channels of the scans for each channel of the width
    """

    image_size: tuple[int, int] = (224, 224)
    embed_dim: int = 48
    depths: tuple[int, ...] = (2, 2, 4, 2)
    num_classes: int = 1000
    d_state: int = 16
    ssm_ratio: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        object.__setattr__(self, "image_size", (given, given) if isinstance(given, int) else tuple(given))
        object.__setattr__(self, "depths", tuple(self.depths))
        if self.embed_dim < GATE_REDUCTION:
            raise UsageError(f"embed_dim must be at least {GATE_REDUCTION}, not {self.embed_dim}")
        if len(self.depths) != 4 or min(self.depths) < 1:
            raise UsageError(f"each of four stages needs a block: depths {self.depths}")
        if min(self.d_state, self.num_classes) < 1 or self.ssm_ratio * self.embed_dim < 1:
            raise UsageError("d_state, num_classes and ssm_ratio must be positive")
        size: tuple[int, ...] = self.image_size
        if len(size) != 2 or any(side < 1 or side % PIXELS for side in size):
            raise UsageError(f"an image of size {size} is not divided by {PIXELS}")

    def without_blocks(self, count: int) -> EfficientVMambaConfig:
        depths = list(self.depths)
        depths[depths.index(max(depths[:SCANNED]))] -= count
        return replace(self, depths=tuple(depths))

    def width(self, stage: int) -> int:
        return self.embed_dim << stage


class ConvBranch(nn.ModuleDict):
    """A depthwise 3x3 convolution, a norm, GELU and a 1x1 one; keys are places in the authors' Sequential."""

    def __init__(self, dim: int) -> None:
        super().__init__(
            {
                "0": nn.Conv2d(dim, dim, 3, padding=1, groups=dim),
                "1": nn.BatchNorm2d(dim),
                "3": nn.Conv2d(dim, dim, 1),
            }
        )

    def forward(self, whole: Tensor, grid: tuple[int, int], positions: Tensor | None) -> Tensor:
        """Of every place of the `grid`, `whole` (B, G, d), what is at `positions` (B, L); None is all: (B, L, d)."""
        x = self["0"](whole.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        if positions is not None:  # the rest looks at one place at a time
            x = gather_tokens(x.contiguous(), positions)
        column = x.transpose(1, 2)[..., None]  # (B, d, L, 1)
        mixed: Tensor = self["3"](functional.gelu(self["1"](column)))
        return mixed[..., 0].transpose(1, 2)


class EfficientBlock(Block):
    """Tokens plus scans and convolution of their norm, each through the same gate over channels."""

    def __init__(self, config: EfficientVMambaConfig, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.op = AtrousMixer(
            dim,
            d_inner=int(config.ssm_ratio * dim),
            d_state=config.d_state,
            dt_rank=math.ceil(dim / 16),
            gated=True,
            conv_bias=True,
        )
        self.conv_branch = ConvBranch(dim)
        self.se = ChannelGate(dim)

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        frozen, context = (
            None if dropped is None else self.norm(dropped.stream.to(self.norm.weight.dtype))
            for dropped in (sequence.frozen, sequence.context)
        )
        grid, normalised = sequence.patch_grid, self.norm(sequence.hidden)
        mixed, statistics = self.op(normalised, sequence, grid, alignment, wanted, frozen, context)
        if sequence.is_dense:
            convolved = self.conv_branch(normalised, grid, None)
        else:
            convolved = self.conv_branch(self.norm(sequence.restored().hidden), grid, sequence.positions)
        both = self.se(mixed, sequence) + self.se(convolved, sequence)
        return replace(sequence, hidden=sequence.hidden + self.drop(both)), statistics


class EfficientStage(nn.Module):
    """The blocks of a stage with scans, and the downsampling after them."""

    def __init__(self, config: EfficientVMambaConfig, number: int) -> None:
        super().__init__()
        dim = config.width(number)
        self.blocks = nn.ModuleList(EfficientBlock(config, dim) for _ in range(config.depths[number]))
        self.downsample = DownsampleV1(dim, 2 * dim)


class SqueezeExcite(nn.Module):
    """A factor from 0 to 1 for each channel, by the mean over the grid."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, reduced, 1)
        self.conv_expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, c, rows, columns) to the same."""
        mean = image.mean(dim=(2, 3), keepdim=True)
        factors: Tensor = self.conv_expand(functional.relu(self.conv_reduce(mean))).sigmoid()
        return image * factors


class InvertedResidual(nn.Module):
    """Convolutions at four times the width: 1x1, depthwise 3x3, a gate, 1x1; added to the input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner = EXPANSION * dim
        self.conv_pw = nn.Sequential(nn.Conv2d(dim, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.conv_dw = nn.Sequential(
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner)
        )
        self.se = SqueezeExcite(inner, inner // GATE_REDUCTION)
        self.conv_pw2 = nn.Sequential(nn.Conv2d(inner, dim, 1, bias=False), nn.BatchNorm2d(dim))

    def forward(self, image: Tensor) -> Tensor:
        """(B, d, rows, columns) to the same."""
        x = functional.relu(self.conv_dw(functional.relu(self.conv_pw(image))))
        mixed: Tensor = self.conv_pw2(self.se(x))
        return image + mixed


class ConvStage(nn.ModuleDict):
    """A stage of convolutions; keys are places in the authors' Sequential, which changes the layout around them."""

    def __init__(self, config: EfficientVMambaConfig, number: int) -> None:
        dim, depth = config.width(number), config.depths[number]
        super().__init__({str(place): InvertedResidual(dim) for place in range(1, depth + 1)})
        self.depth = depth
        if number + 1 < len(config.depths):
            self[str(depth + 2)] = DownsampleV1(dim, 2 * dim)

    @property
    def downsample(self) -> nn.Module:
        """After the stage; the last one has none."""
        return self[str(self.depth + 2)]

    def forward(self, sequence: TokenSequence) -> TokenSequence:
        """The tokens of a whole grid to the same."""
        image = sequence.hidden.transpose(1, 2).unflatten(2, sequence.patch_grid)
        for place in range(1, self.depth + 1):
            image = self[str(place)](image)
        return replace(sequence, hidden=image.flatten(2).transpose(1, 2))


class EfficientVMamba(StagedBackbone):
    """See EfficientVMambaConfig."""

    family = "efficientvmamba"

    def __init__(self, config: EfficientVMambaConfig) -> None:
        super().__init__()
        self.config: EfficientVMambaConfig = config
        self.patch_embed = PatchEmbedV1(config.embed_dim)
        stages: list[nn.Module] = [EfficientStage(config, number) for number in range(SCANNED)]
        stages += [ConvStage(config, number) for number in range(SCANNED, len(config.depths))]
        self.layers = nn.ModuleList(stages)
        dim = config.width(len(config.depths) - 1)
        head = nn.Linear(dim, config.num_classes)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(dim), "head": head})

    @property
    def scanned_layers(self) -> Sequence[Any]:
        return list(self.layers)[:SCANNED]

    def forward(self, images: Tensor) -> Tensor:
        check_size(images, self.image_size)
        *_, whole = self._stages(images)
        layers: list[Any] = list(self.layers)
        for before, layer in pairwise(layers[SCANNED - 1 :]):
            x = before.downsample(whole.hidden.unflatten(1, whole.patch_grid))
            whole = layer(next_stage(x, whole))
        return self.classify(whole.mean(self.classifier["norm"](whole.hidden)), whole.readout)

    @property
    def output_layer(self) -> nn.Linear:
        return self.classifier["head"]  # type: ignore[return-value]

    @property
    def mixers(self) -> Mixers:
        return [block.op for block in self.blocks]  # type: ignore[misc]

    @property
    def places(self) -> Places:
        last = SCANNED - 1
        return Places(
            before=("patch_embed",),
            after=(f"layers.{last}.downsample", "layers.2", "layers.3", "classifier"),
            undecayed=("A_logs", "dt_projs_bias"),
            decayed=("x_proj_weight", "dt_projs_weight"),
            between={f"layers.{number}.downsample": self.stages[number].stop for number in range(last)},
        )

    @property
    def grid(self) -> tuple[int, int]:
        return PatchEmbedV1.grid(self.image_size)
