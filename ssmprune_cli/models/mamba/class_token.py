"""What Vim and LocalVim have in common: class tokens among the patches, positions, and rotary tables.

hustvl/Vim dd0358a (vim/models_mamba.py) and hunto/LocalMamba 75e5d1f (classification/lib/models/local_vim.py), with the
authors' parameter names. Letters: B batch, d model width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import RotaryEmbedding
from ssmprune_cli.models.mamba.backbone import MambaBackbone, MambaConfig, embedding
from ssmprune_cli.tokens import TokenSequence

ClassToken = Literal["middle", "head", "double", "none"]


@dataclass(frozen=True)
class ClassTokenConfig(MambaConfig):
    """A sequence with class tokens; see MambaConfig.

    class_token  in the middle of the patches, before them, at both ends, or none (mean pooling)
    rope         turn the hidden states before every block, and with `rope_residual` the residuals too
    """

    class_token: ClassToken = "middle"
    rope: bool = False
    rope_residual: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope and (self.class_token == "double" or self.embed_dim % 4):
            raise UsageError("rope needs an embed_dim that 4 divides, and at most one class token")


class ClassTokenBackbone(MambaBackbone):
    """A family calls `add_tokens`, and makes its blocks and `head`."""

    tokens = ("cls_token", "cls_token_head", "cls_token_tail", "pos_embed")
    config: ClassTokenConfig

    def add_tokens(self) -> None:
        """Make class tokens, positions and rotary tables."""
        config = self.config
        for name in CLASS_TOKENS[config.class_token]:
            self.register_parameter(name, embedding(1, config.embed_dim))
        self.pos_embed = embedding(self.num_tokens, config.embed_dim)
        tables = RotaryEmbedding(config.embed_dim, self.grid, class_token=bool(self.protected)) if config.rope else None
        self.rope: RotaryEmbedding | None = tables

    def embed(self, images: Tensor) -> TokenSequence:
        patches = self.patch_embed(images)
        names = CLASS_TOKENS[self.config.class_token]
        tokens = [getattr(self, name).expand(patches.shape[0], -1, -1) for name in names]  # (B, 1, d) each
        if self.config.class_token == "double":
            patches = torch.cat((tokens[0], patches, tokens[1]), dim=1)
        elif tokens:
            (place,) = self.protected
            patches = torch.cat((patches[:, :place], tokens[0], patches[:, place:]), dim=1)
        return TokenSequence.dense(patches + self.pos_embed, self.protected, grid=self.grid)

    def before_block(self, sequence: TokenSequence) -> TokenSequence:
        if self.rope is None:
            return sequence
        rope = self.rope
        residual, frozen, context = sequence.residual, sequence.frozen, sequence.context
        positions = None if sequence.is_untouched else sequence.dense_positions()
        if self.config.rope_residual:
            residual = None if residual is None else rope(residual, positions)
            frozen, context = (
                None if dropped is None else replace(dropped, stream=rope(dropped.stream, dropped.positions))
                for dropped in (frozen, context)
            )
        hidden = rope(sequence.hidden, positions)
        return replace(sequence, hidden=hidden, residual=residual, frozen=frozen, context=context)

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, d): the normalised class token, the mean of two, or the mean over tokens."""
        dtype = self.norm_f.weight.dtype
        if not self.protected:
            return sequence.mean(self.norm_f(sequence.stream.to(dtype)))
        normalised: Tensor = self.norm_f(sequence.protected_stream().to(dtype))  # (B, 1 or 2, d)
        return normalised.mean(dim=1)

    @property
    def protected(self) -> tuple[int, ...]:
        return class_positions(self.config.class_token, math.prod(self.grid))


CLASS_TOKENS: Mapping[ClassToken, tuple[str, ...]] = {
    "middle": ("cls_token",),
    "head": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


def class_positions(kind: ClassToken, patches: int) -> tuple[int, ...]:
    """Dense positions of the class tokens among `patches` patches."""
    return {"middle": (patches // 2,), "head": (0,), "double": (0, patches + 1), "none": ()}[kind]
