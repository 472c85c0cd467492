"""VideoMamba for images: arXiv 2403.06977, OpenGVLab/VideoMamba at f3427e4 (videomamba/image_sm), the authors' names.

The keys and shapes of Vim, but another computation: the class token comes before the patches, and the outputs of both
directions are added without halving. See `mamba_checkpoint` for how files are told apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ssmprune_cli.models.common import Family, Hints, Shapes
from ssmprune_cli.models.mamba.backbone import MambaBackbone, MambaConfig, classifier, embedding
from ssmprune_cli.models.mamba.checkpoint import (
    COMPUTES,
    as_published,
    fills,
    is_mamba,
    mixer_has,
    named_families,
    read_sizes,
    resize_positions,
)
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class VideoMambaConfig(MambaConfig):
    """Everything that defines a VideoMamba for images; see MambaConfig.

    bimamba  scan in both directions (all released models)
    """

    bimamba: bool = True


class VideoMamba(MambaBackbone):
    """See VideoMambaConfig."""

    family = "videomamba"
    tokens: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")
    config: VideoMambaConfig

    def __init__(self, config: VideoMambaConfig) -> None:
        super().__init__(config)
        self.make_tokens()
        self.add_blocks(kind="v2" if config.bimamba else "none", halve=False)
        self.head = classifier(config.embed_dim, config.num_classes)

    def make_tokens(self) -> None:
        """Make the class token and the positions."""
        self.cls_token = embedding(1, self.config.embed_dim)
        self.pos_embed = embedding(self.num_tokens, self.config.embed_dim)

    def embed(self, images: Tensor) -> TokenSequence:
        patches = self.patch_embed(images)
        tokens = torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), dim=1)  # (B, 1 + patches, d)
        return TokenSequence.dense(tokens + self.pos_embed, self.protected, grid=self.grid)

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, d): the normalised class token."""
        token = sequence.protected_stream()[:, 0]  # (B, d)
        pooled: Tensor = self.norm_f(token.to(self.norm_f.weight.dtype))
        return pooled

    @property
    def protected(self) -> tuple[int, ...]:
        return (0,)


VARIANTS = {
    "videomamba_tiny": VideoMambaConfig(embed_dim=192),
    "videomamba_small": VideoMambaConfig(embed_dim=384),
    "videomamba_middle": VideoMambaConfig(embed_dim=576, depth=32),
    "videomamba_base": VideoMambaConfig(embed_dim=768),
}
SIDES = (224, 448, 576)  # that the authors' files are for


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are VideoMamba's keys, and no name says that they are those of Vim, which can have the same ones.

    Keys of Vim alone are rope tables, layer scale, two class tokens or none, and directions that share projections.
    """
    shared = mixer_has(shapes, "A_b_log") and not mixer_has(shapes, "D_b")
    vim_only = shared or mixer_has(shapes, "gamma") or "rope.freqs_cos" in shapes or "pos_embed_cls" in shapes
    return is_mamba(shapes) and "cls_token" in shapes and not vim_only and named_families(hints) != {"vim"}


def configure(shapes: Shapes, hints: Hints) -> VideoMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError.
    """
    if hints.variant:
        return as_published(VARIANTS[hints.variant], shapes, hints, "VideoMamba", extra_positions=1, sides=SIDES)
    sizes = read_sizes(shapes, hints, VARIANTS, "VideoMamba", extra_positions=1, sides=SIDES)
    return VideoMambaConfig(**sizes, bimamba=mixer_has(shapes, "D_b"))


def resize(
    state: dict[str, Tensor], config: VideoMambaConfig, image_size: int
) -> tuple[dict[str, Tensor], VideoMambaConfig]:
    """For images of another size: bicubic for the patches' positions."""
    moved, resized = resize_positions(state["pos_embed"], config, image_size, old_class=(0,), new_class=(0,))
    return {**state, "pos_embed": moved}, resized


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a VideoMamba file is a weight, under the name that we use too."""
    return state


VIDEOMAMBA: Family = Family(
    name="videomamba",
    title="VideoMamba",
    matches=matches,
    configure=configure,
    build=VideoMamba,
    config_class=VideoMambaConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
