"""Vision Mamba (Vim): arXiv 2401.09417, hustvl/Vim at dd0358a, with the authors' parameter names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.models.layers import PatchEmbed, RMSNorm, RotaryEmbedding
from ssmprune_cli.models.mamba_mixer import MambaBlock, MambaMixer, MixerKind, init_output_projection
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.tokens import Mixers, TokenSequence

ClassToken = Literal["middle", "head", "double", "none"]
NORM_EPS = 1e-5


@dataclass(frozen=True)
class VimConfig:
    """Everything that defines a Vim. An int for `image_size` is a square. Raises UsageError for what does not fit.

    stride           patches overlap when it is smaller than `patch_size`, as in the "+" models
    d_inner          channels of the scans; None is twice `embed_dim`
    dt_rank          rank of the step projection; None is `embed_dim / 16`, rounded up
    class_token      in the middle of the patches (released models), before them, at both ends, or none (mean pooling)
    mixer            "v2" (released models), "v1" or "none": see MambaMixer
    divide_out       halve the sum of both directions (all released models but the first)
    layer_scale      start of the mixers' gamma; None for no gamma
    rope             turn the hidden states before every block, and with `rope_residual` the residuals too
    eval_crop_ratio  part of the resized image that the centre crop keeps
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
    class_token: ClassToken = "middle"
    mixer: MixerKind = "v2"
    divide_out: bool = True
    layer_scale: float | None = None
    norm: Literal["rms", "layer"] = "rms"
    rope: bool = False
    rope_residual: bool = True
    eval_crop_ratio: float = 0.875

    def __post_init__(self) -> None:
        given: Any = self.image_size  # an int, or a list from JSON
        size = (given, given) if isinstance(given, int) else tuple(given)
        object.__setattr__(self, "image_size", size)
        if len(size) != 2 or min(size) < self.patch_size:
            raise UsageError(f"an image of size {size} has no room for a patch of {self.patch_size} pixels")
        for name in ("patch_size", "stride", "embed_dim", "depth", "num_classes", "d_state", "d_conv"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.rope and (self.class_token == "double" or self.embed_dim % 4):
            raise UsageError("rope needs an embed_dim that 4 divides, and at most one class token")


class Vim(Backbone):
    """See VimConfig. `features` are the tokens after the last block, before the final norm."""

    family = "vim"
    cls_token: nn.Parameter

    def __init__(self, config: VimConfig) -> None:
        super().__init__()
        self.config: VimConfig = config
        dim = config.embed_dim
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, config.stride, dim)
        rows, columns = self.grid
        for name in CLASS_TOKENS[config.class_token]:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, dim)))
            nn.init.trunc_normal_(getattr(self, name), std=0.02)
        self.pos_embed = nn.Parameter(torch.empty(1, rows * columns + len(self.protected), dim))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.rope = RotaryEmbedding(dim, self.grid, class_token=bool(self.protected)) if config.rope else None
        self.layers = nn.ModuleList(_block(config) for _ in range(config.depth))
        self.norm_f = _norm(config)
        self.head = nn.Linear(dim, config.num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def embed(self, images: Tensor) -> TokenSequence:
        """Images (B, 3, H, W) to the dense sequence with class tokens and position embeddings."""
        patches = self.patch_embed(images)
        if self.config.class_token == "double":
            first, last = (getattr(self, name).expand(patches.shape[0], -1, -1) for name in CLASS_TOKENS["double"])
            patches = torch.cat((first, patches, last), dim=1)
        elif self.config.class_token != "none":
            (place,) = self.protected
            token = self.cls_token.expand(patches.shape[0], -1, -1)
            patches = torch.cat((patches[:, :place], token, patches[:, place:]), dim=1)
        return TokenSequence.dense(patches + self.pos_embed, self.protected)

    def features(self, images: Tensor) -> TokenSequence:
        """The tokens that are left after all blocks; their output is `hidden + residual`."""
        sequence, pruner = self.embed(images), self.pruner
        for block, layer in enumerate(self.layers):
            if self.rope is not None:
                sequence = self._rotate(sequence, self.rope)
            alignment = None if pruner is None or sequence.is_dense else pruner.alignment(block)
            sequence, statistics = layer(sequence, alignment, pruner is not None and pruner.wants_delta(block))
            if pruner is not None:
                sequence = pruner(block, sequence, statistics)
        return sequence

    def _rotate(self, sequence: TokenSequence, rope: RotaryEmbedding) -> TokenSequence:
        residual = sequence.residual
        if residual is not None and self.config.rope_residual:
            residual = rope(residual, sequence)
        return replace(sequence, hidden=rope(sequence.hidden, sequence), residual=residual)

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, d): what the head sees: the normalised class token, the mean of two, or the mean over tokens."""
        stream = sequence.stream
        dtype = self.norm_f.weight.dtype
        if not self.protected:
            return sequence.mean(self.norm_f(stream.to(dtype)))
        tokens = torch.stack([sequence.at(stream, place) for place in self.protected])  # (1 or 2, B, d)
        normalised: Tensor = self.norm_f(tokens.to(dtype))
        return normalised.mean(dim=0)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(images)))
        return logits

    @property
    def mixers(self) -> Mixers:
        return [layer.mixer for layer in self.layers]  # type: ignore[misc]

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1] + len(self.protected)

    @property
    def protected(self) -> tuple[int, ...]:
        return class_positions(self.config.class_token, math.prod(self.grid))

    @property
    def grid(self) -> tuple[int, int]:
        return self.patch_embed.grid

    @property
    def image_size(self) -> tuple[int, int]:
        return self.config.image_size

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def preprocessing(self) -> Preprocessing:
        """As the authors evaluate. Raises UsageError for images that are not square, which they do not define."""
        height, width = self.image_size
        if height != width:
            raise UsageError(f"no preprocessing is published for images of {height} x {width} pixels")
        return Preprocessing(resize=int(height / self.config.eval_crop_ratio), crop=height)


CLASS_TOKENS: Mapping[ClassToken, tuple[str, ...]] = {
    "middle": ("cls_token",),
    "head": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


def class_positions(kind: ClassToken, patches: int) -> tuple[int, ...]:
    """Dense positions of the class tokens among `patches` patches."""
    return {"middle": (patches // 2,), "head": (0,), "double": (0, patches + 1), "none": ()}[kind]


def _norm(config: VimConfig) -> nn.LayerNorm | RMSNorm:
    kind = RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.embed_dim, eps=NORM_EPS)


def _block(config: VimConfig) -> MambaBlock:
    mixer = MambaMixer(
        config.embed_dim,
        d_inner=config.d_inner or 2 * config.embed_dim,
        d_state=config.d_state,
        d_conv=config.d_conv,
        dt_rank=config.dt_rank or math.ceil(config.embed_dim / 16),
        kind=config.mixer,
        halve=config.divide_out,
        gamma=config.layer_scale,
    )
    init_output_projection(mixer.out_proj, config.depth)
    return MambaBlock(_norm(config), mixer)
