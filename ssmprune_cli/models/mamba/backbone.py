"""What models of one sequence of Mamba blocks have in common, and those of images: patches and a few more tokens.

The families differ in which tokens join the patches, where, and what the head sees of them. Letters: B batch, L tokens,
d model width.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixers
from ssmprune_cli.models.common import Backbone, Block, ImageConfig, PatchEmbed, Places, RMSNorm
from ssmprune_cli.models.mamba.block import MambaBlock
from ssmprune_cli.models.mamba.mixer import MambaMixer, MixerKind, SequenceMixer, init_output_projection
from ssmprune_cli.tokens import TokenSequence

NORM_EPS = 1e-5


@dataclass(frozen=True)
class MambaConfig(ImageConfig):
    """Sizes of a sequence of Mamba blocks. An int for `image_size` is a square. UsageError for what does not fit.

    stride   patches overlap when it is smaller than `patch_size`
    d_inner  channels of the scans; None is twice `embed_dim`
    dt_rank  rank of the step projection; None is `embed_dim / 16`, rounded up
    """

    image_size: tuple[int, int] = (224, 224)
    patch_size: int = 16
    stride: int = 16
    embed_dim: int = 192
    depth: int = 24
    num_classes: int = 1000
    d_state: int = 16
    d_conv: int = 4
    d_inner: int | None = None
    dt_rank: int | None = None
    norm: Literal["rms", "layer"] = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.image_size  # an int, or a list from JSON
        size = (given, given) if isinstance(given, int) else tuple(given)
        object.__setattr__(self, "image_size", size)
        if len(size) != 2 or min(size) < self.patch_size:
            raise UsageError(f"an image of size {size} has no room for a patch of {self.patch_size} pixels")
        for name in ("patch_size", "stride", "embed_dim", "depth", "num_classes", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")

    def without_blocks(self, count: int) -> MambaConfig:
        return replace(self, depth=self.depth - count)

    @property
    def inner_channels(self) -> int:
        """Channels of the scans."""
        return self.d_inner or 2 * self.embed_dim

    @property
    def mixer_sizes(self) -> dict[str, int]:
        """What every mixer is made with."""
        return {
            "dim": self.embed_dim,
            "d_inner": self.inner_channels,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
            "dt_rank": self.dt_rank or math.ceil(self.embed_dim / 16),
        }


class MambaSequence(Backbone):
    """One sequence of tokens in Mamba blocks. A family says `embed` and `pool`, and calls `add_mixers`.

    `features` are the tokens after the last block, before the final norm.

    tokens        names of the family's learned tokens and positions
    rates         names of the decay rates in its mixers
    before_blocks, after_blocks  names of its modules before the first block and after the last one
    """

    tokens: ClassVar[tuple[str, ...]]
    rates: tuple[str, ...] = ("A_log", "A_b_log")
    before_blocks: ClassVar[tuple[str, ...]] = ()
    after_blocks: tuple[str, ...]
    layers: nn.ModuleList
    norm_f: nn.LayerNorm | RMSNorm

    def add_mixers(self, mixers: Sequence[SequenceMixer]) -> None:
        """Make `layers` of these, and `norm_f`."""
        config = self.config
        for mixer in mixers:
            init_output_projection(mixer.out_proj, config.depth)
        self.layers = nn.ModuleList(MambaBlock(make_norm(config, config.embed_dim), mixer) for mixer in mixers)
        self.norm_f = make_norm(config, config.embed_dim)

    @abstractmethod
    def embed(self, images: Tensor) -> TokenSequence:
        """The dense sequence of what `forward` takes."""

    @abstractmethod
    def pool(self, sequence: TokenSequence) -> Tensor:
        """What the head sees of the tokens that are left."""

    def before_block(self, sequence: TokenSequence) -> TokenSequence:
        """What a block is given: the sequence itself, unless a family turns tokens before every block."""
        return sequence

    def features(self, images: Tensor) -> TokenSequence:
        """The tokens that are left after all blocks; their output is `hidden + residual`."""
        sequence = self.embed(images)
        for block, layer in enumerate(self.layers):
            sequence = self.before_block(sequence)
            alignment, wanted = self.ask_pruner(block, sequence)
            sequence, statistics = layer(sequence, alignment, wanted)
            sequence = self.prune(block, sequence, statistics, wanted)
        return sequence

    def forward(self, images: Tensor) -> Tensor:
        sequence = self.features(images)
        return self.classify(self.pool(sequence), sequence.readout)

    @property
    def blocks(self) -> list[Block]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def places(self) -> Places:
        return Places((*self.before_blocks, *self.tokens), self.after_blocks, (*self.tokens, *self.rates))

    @property
    def mixers(self) -> Mixers:
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]


class MambaBackbone(MambaSequence):
    """Of images. A family makes its own tokens and `head`, calls `add_blocks` or `add_mixers` between them, and says
    `embed`, `pool` and `protected`."""

    before_blocks: ClassVar[tuple[str, ...]] = ("patch_embed",)
    after_blocks: tuple[str, ...] = ("norm_f", "head")
    config: MambaConfig
    head: nn.Linear

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = self.make_patch_embed(config)

    def make_patch_embed(self, config: Any) -> Any:
        """What makes patches of images, and knows their `grid`."""
        return PatchEmbed(config.image_size, config.patch_size, config.stride, config.embed_dim)

    def add_blocks(self, *, kind: MixerKind, halve: bool, gamma: float | None = None) -> None:
        """Make `layers` and `norm_f`; the options are those of MambaMixer."""
        sizes = self.config.mixer_sizes
        self.add_mixers([MambaMixer(**sizes, kind=kind, halve=halve, gamma=gamma) for _ in range(self.config.depth)])

    @abstractmethod
    def embed(self, images: Tensor) -> TokenSequence:
        """Images (B, 3, H, W) to the dense sequence with class tokens and position embeddings."""

    @abstractmethod
    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, features): what the head sees of the tokens that are left."""

    @property
    def output_layer(self) -> nn.Linear:
        return self.head

    @property
    def grid(self) -> tuple[int, int]:
        grid: tuple[int, int] = self.patch_embed.grid
        return grid


def make_norm(config: Any, dim: int) -> nn.LayerNorm | RMSNorm:
    """The kind of norm that all of a model's norms are, over `dim` channels."""
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(dim, eps=NORM_EPS)


def embedding(count: int, dim: int) -> nn.Parameter:
    """`count` learned tokens or positions, (1, count, dim), as the authors start them."""
    values = nn.Parameter(torch.empty(1, count, dim))
    nn.init.trunc_normal_(values, std=0.02)
    return values


def classifier(dim: int, num_classes: int) -> nn.Linear:
    """The head, as the authors start it."""
    head = nn.Linear(dim, num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head
