"""Mamba-Reg: arXiv 2405.14858, wangf3014/Mamba-Reg at 0f7c2da, with the authors' parameter names.

A *register* is a learned token without a patch. The authors call them class tokens: they are spread evenly over the
sequence, and the head sees them all. Letters: B batch, d model width, k registers, r what the neck divides channels by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import Family, Hints, Shapes
from ssmprune_cli.models.mamba.backbone import MambaBackbone, MambaConfig, classifier, embedding, make_norm
from ssmprune_cli.models.mamba.checkpoint import (
    COMPUTES,
    as_published,
    fills,
    is_mamba,
    mixer_has,
    read_sizes,
    resize_positions,
    shape_of,
)
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class MambaRegConfig(MambaConfig):
    """Everything that defines a Mamba-Reg; see MambaConfig.

    num_cls_tokens  registers
    cls_reduce      the neck reduces a register's channels by this factor; 1 is no neck. Divides d and the registers.
    """

    num_cls_tokens: int = 12
    cls_reduce: int = 1
    eval_crop_ratio: float | None = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_cls_tokens, self.cls_reduce) < 1:
            raise UsageError("num_cls_tokens and cls_reduce must be at least 1")
        if self.num_cls_tokens % self.cls_reduce or self.embed_dim % self.cls_reduce:
            raise UsageError(f"cls_reduce {self.cls_reduce} must divide num_cls_tokens and embed_dim")


class MambaReg(MambaBackbone):
    """See MambaRegConfig. All registers are protected: they never leave, and stay at their true rank."""

    family = "mambar"
    tokens = ("cls_token", "pos_embed_cls", "pos_embed")
    after_blocks = ("norm_f", "neck", "norm_neck", "head")
    config: MambaRegConfig

    def __init__(self, config: MambaRegConfig) -> None:
        super().__init__(config)
        dim, registers = config.embed_dim, config.num_cls_tokens
        features = registers * dim // config.cls_reduce
        self.cls_token = embedding(registers, dim)
        self.pos_embed_cls = embedding(registers, dim)
        self.pos_embed = embedding(math.prod(self.grid), dim)
        if config.cls_reduce > 1:
            self.neck = nn.Linear(dim, dim // config.cls_reduce, bias=False)
            nn.init.trunc_normal_(self.neck.weight, std=0.02)
            self.norm_neck = make_norm(config, features)
        self.head = classifier(features, config.num_classes)
        self.add_blocks(kind="v2", halve=True)

    def embed(self, images: Tensor) -> TokenSequence:
        patches = self.patch_embed(images) + self.pos_embed
        registers = (self.cls_token + self.pos_embed_cls).expand(patches.shape[0], -1, -1)
        count = registers.shape[1]
        run = patches.shape[1] // (count + 1)
        runs = patches[:, : run * count].unflatten(1, (count, run))  # (B, k, run, d)
        spread = torch.cat((runs, registers[:, :, None]), dim=2).flatten(1, 2)  # (B, k * (run + 1), d)
        tokens = torch.cat((spread, patches[:, run * count :]), dim=1)
        return TokenSequence.dense(tokens, self.protected, grid=self.grid)

    def pool(self, sequence: TokenSequence) -> Tensor:
        """(B, k d / r): the normalised registers one after another, each reduced by the neck."""
        registers = sequence.protected_stream()  # (B, k, d)
        normalised: Tensor = self.norm_f(registers.to(self.norm_f.weight.dtype))
        if self.config.cls_reduce > 1:
            normalised = self.norm_neck(self.neck(normalised).flatten(1))
        return normalised.flatten(1)

    @property
    def protected(self) -> tuple[int, ...]:
        return register_positions(math.prod(self.grid), self.config.num_cls_tokens)


def register_positions(patches: int, registers: int) -> tuple[int, ...]:
    """Dense positions: a register after each run of `patches // (registers + 1)` patches; the rest comes last."""
    run = patches // (registers + 1)
    return tuple(run + i * (run + 1) for i in range(registers))


VARIANTS = {
    "mambar_small": MambaRegConfig(embed_dim=384, cls_reduce=2),
    "mambar_base": MambaRegConfig(embed_dim=768, cls_reduce=4),
    "mambar_large": MambaRegConfig(embed_dim=1024, depth=48, num_cls_tokens=16, cls_reduce=8),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are Mamba-Reg's keys, which no other family has."""
    return is_mamba(shapes) and "pos_embed_cls" in shapes and mixer_has(shapes, "D_b")


def configure(shapes: Shapes, hints: Hints) -> MambaRegConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError.
    """
    if hints.variant:
        return as_published(VARIANTS[hints.variant], shapes, hints, "Mamba-Reg", extra_positions=0)
    sizes = read_sizes(shapes, hints, VARIANTS, "Mamba-Reg", extra_positions=0)
    reduced = shape_of(shapes, "neck.weight", 2, "Mamba-Reg")[0] if "neck.weight" in shapes else sizes["embed_dim"]
    registers = shape_of(shapes, "pos_embed_cls", 3, "Mamba-Reg")[1]
    try:
        return MambaRegConfig(**sizes, num_cls_tokens=registers, cls_reduce=sizes["embed_dim"] // max(reduced, 1))
    except UsageError as error:
        raise CheckpointError(f"not a Mamba-Reg classifier: {error.what}") from error


def resize(
    state: dict[str, Tensor], config: MambaRegConfig, image_size: int
) -> tuple[dict[str, Tensor], MambaRegConfig]:
    """For images of another size: bicubic for the patches' positions; registers have their own."""
    moved, resized = resize_positions(state["pos_embed"], config, image_size)
    return {**state, "pos_embed": moved}, resized


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a Mamba-Reg file is a weight, under the name that we use too."""
    return state


MAMBA_REG: Family = Family(
    name="mambar",
    title="Mamba-Reg",
    matches=matches,
    configure=configure,
    build=MambaReg,
    config_class=MambaRegConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
