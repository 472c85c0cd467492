"""VMamba: arXiv 2401.10166, MzeroMiko/VMamba at 2ed52ea, with the authors' parameter names.

Four stages of blocks; between two of them a downsampling halves the grid and doubles the width: see staged.py.
Letters: B batch, L tokens now, d model width of a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import Block, ImageConfig, Places, check_size
from ssmprune_cli.models.vmamba.layers import MLP, DownsampleV1, DownsampleV3, PatchEmbedV1, PatchEmbedV2
from ssmprune_cli.models.vmamba.mixer import VMambaMixer
from ssmprune_cli.models.vmamba.staged import StagedBackbone
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class VMambaConfig(ImageConfig):
    """Everything that defines a VMamba. An int for `image_size` is a square. Raises UsageError for what does not fit.

    image_size   what tokens are counted for; the dense model takes images of any size
    patch_embed  "v2": two overlapping convolutions (v2 models). "v1": 4x4 patches (v0 models)
    downsample   "v3": an overlapping convolution (v2 models). "v1": patch merging (v0 models)
    embed_dim    width of the first stage; every later stage doubles it
    depths       blocks of each stage
    num_classes  0 for a model without classifier, whose output is the mean over the last feature map
    ssm_ratio    channels of the scans for each channel of the width
    gated        the scans' output is multiplied by a gate (v0 models)
    conv_bias    the 3x3 convolutions have a bias (v0 models)
    mlp_ratio    hidden channels of the MLP for each channel of the width; 0 for blocks without MLP (v0 models)
    out_stages   stages, counted from 0, that end in a norm of their own: the feature maps of detection backbones
    """

    image_size: tuple[int, int] = (224, 224)
    patch_embed: Literal["v1", "v2"] = "v2"
    downsample: Literal["v1", "v3"] = "v3"
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 8, 2)
    num_classes: int = 1000
    d_state: int = 1
    ssm_ratio: float = 1.0
    gated: bool = False
    conv_bias: bool = False
    mlp_ratio: float = 4.0
    out_stages: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        object.__setattr__(self, "image_size", (given, given) if isinstance(given, int) else tuple(given))
        for name in ("depths", "out_stages"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        size: tuple[int, ...] = self.image_size
        if len(size) != 2 or min(size) < 4:
            raise UsageError(f"an image of size {size} has no room for a patch of 4 pixels")
        if self.embed_dim < 2 or self.embed_dim % 2:
            raise UsageError(f"embed_dim must be even, not {self.embed_dim}")
        if not self.depths or min(self.depths) < 1:
            raise UsageError(f"every stage needs a block: depths {self.depths}")
        if self.d_state < 1 or self.num_classes < 0 or self.ssm_ratio * self.embed_dim < 1 or self.mlp_ratio < 0:
            raise UsageError("d_state and ssm_ratio must be positive, num_classes and mlp_ratio not negative")
        if self.out_stages != tuple(stage for stage in range(len(self.depths)) if stage in self.out_stages):
            raise UsageError(f"out_stages must be stages from 0 to {len(self.depths) - 1}, not {self.out_stages}")

    def without_blocks(self, count: int) -> VMambaConfig:
        depths = list(self.depths)
        depths[depths.index(max(depths))] -= count
        return replace(self, depths=tuple(depths))

    def width(self, stage: int) -> int:
        return self.embed_dim << stage

    def mixer(self, dim: int, block: int) -> VMambaMixer:
        """The mixer of a block of this width; `block` counts from the first of the model."""
        return VMambaMixer(dim, **self.mixer_sizes(dim))

    def mixer_sizes(self, dim: int) -> dict[str, Any]:
        """What a mixer of this width is made with."""
        return {
            "d_inner": int(self.ssm_ratio * dim),
            "d_state": self.d_state,
            "dt_rank": math.ceil(dim / 16),
            "gated": self.gated,
            "conv_bias": self.conv_bias,
        }

    @property
    def map_channels(self) -> tuple[int, ...]:
        """Of the feature maps."""
        return tuple(self.width(stage) for stage in self.out_stages)


class VMambaBlock(Block):
    """Tokens plus the mixer of their norm, plus the MLP of their norm. Tokens that are gone cost nothing."""

    def __init__(self, config: VMambaConfig, mixer: VMambaMixer) -> None:
        super().__init__()
        dim = mixer.d_model
        self.norm = nn.LayerNorm(dim)
        self.op = mixer
        self.norm2 = nn.LayerNorm(dim) if config.mlp_ratio else None
        self.mlp = MLP(dim, int(config.mlp_ratio * dim)) if config.mlp_ratio else None

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        frozen, context = (
            None if dropped is None else self.norm(dropped.stream.to(self.norm.weight.dtype))
            for dropped in (sequence.frozen, sequence.context)
        )
        normalised = self.norm(sequence.hidden)
        mixed, statistics = self.op(normalised, sequence, sequence.patch_grid, alignment, wanted, frozen, context)
        hidden = sequence.hidden + self.drop(mixed)
        if self.mlp is not None and self.norm2 is not None:
            hidden = hidden + self.drop(self.mlp(self.norm2(hidden)))
        return replace(sequence, hidden=hidden), statistics


class VMambaStage(nn.Module):
    """The blocks of a stage, and the downsampling after them; the last stage has none."""

    def __init__(self, config: VMambaConfig, number: int) -> None:
        super().__init__()
        dim, first = config.width(number), sum(config.depths[:number])
        self.blocks = nn.ModuleList(
            VMambaBlock(config, config.mixer(dim, first + block)) for block in range(config.depths[number])
        )
        downsample = DownsampleV1 if config.downsample == "v1" else DownsampleV3
        self.downsample = downsample(dim, 2 * dim) if number + 1 < len(config.depths) else None


class VMamba(StagedBackbone):
    """See VMambaConfig."""

    family = "vmamba"
    patch_embed: PatchEmbedV1 | PatchEmbedV2

    def __init__(self, config: VMambaConfig) -> None:
        super().__init__()
        if not (config.num_classes or config.out_stages):
            raise UsageError("a model without classes needs out_stages")
        self.config: VMambaConfig = config
        self.patch_embed = (PatchEmbedV1 if config.patch_embed == "v1" else PatchEmbedV2)(config.embed_dim)
        self.layers = nn.ModuleList(VMambaStage(config, number) for number in range(len(config.depths)))
        for number in config.out_stages:
            self.add_module(f"outnorm{number}", nn.LayerNorm(config.width(number)))
        if config.num_classes:
            dim = config.width(len(config.depths) - 1)
            head = nn.Linear(dim, config.num_classes)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            self.classifier = nn.ModuleDict({"norm": nn.LayerNorm(dim), "head": head})

    def feature_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The normalised outputs of `out_stages`, (B, d, rows, columns) each, as detectors take them."""
        maps = []
        for number, x in enumerate(self.stage_outputs(images)):
            if number in self.config.out_stages:
                maps.append(getattr(self, f"outnorm{number}")(x).permute(0, 3, 1, 2))
        return tuple(maps)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images (B, 3, H, W); without classes the last map's mean (B, d)."""
        if not self.config.num_classes:
            return self.feature_maps(images)[-1].mean(dim=(2, 3))
        if self.pruner is not None:
            check_size(images, self.image_size)  # accuracy was judged at the counts of this size
        *_, whole = self._stages(images)
        return self.classify(whole.mean(self.classifier["norm"](whole.hidden)), whole.readout)

    @property
    def output_layer(self) -> nn.Linear:
        if not self.config.num_classes:
            return super().output_layer
        return self.classifier["head"]  # type: ignore[return-value]

    @property
    def places(self) -> Places:
        stops = [stage.stop for stage in self.stages]
        downsamplings = {f"layers.{number}.downsample": stop for number, stop in enumerate(stops)}
        maps = {f"outnorm{number}": stops[number] for number in self.config.out_stages}
        return Places(
            before=("patch_embed",),
            after=("classifier",),
            undecayed=("A_logs", "dt_projs_bias"),
            decayed=("x_proj_weight", "dt_projs_weight"),
            between=downsamplings if self.config.num_classes else {**downsamplings, **maps},
            idle=tuple(maps) if self.config.num_classes else (),
        )

    @property
    def mixers(self) -> Mixers:
        return [block.op for block in self.blocks]  # type: ignore[misc]

    @property
    def grid(self) -> tuple[int, int]:
        return self.patch_embed.grid(self.image_size)
