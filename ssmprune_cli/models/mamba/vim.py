"""Vision Mamba (Vim): arXiv 2401.09417, hustvl/Vim at dd0358a, with the authors' parameter names."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models.common import Family, Hints, Shapes, check_side, patch_grid, rotary_tables
from ssmprune_cli.models.mamba.backbone import classifier
from ssmprune_cli.models.mamba.checkpoint import (
    COMPUTES,
    as_published,
    fills,
    is_mamba,
    mixer_has,
    named_families,
    read_sizes,
    resize_positions,
    stated_flag,
)
from ssmprune_cli.models.mamba.class_token import (
    CLASS_TOKENS,
    ClassToken,
    ClassTokenBackbone,
    ClassTokenConfig,
    class_positions,
)
from ssmprune_cli.models.mamba.mixer import MixerKind


@dataclass(frozen=True)
class VimConfig(ClassTokenConfig):
    """Everything that defines a Vim; patches overlap (`stride` 8) in the "+" models. See ClassTokenConfig.

    Released models have one class token in the middle of the patches, but for the first, which has it before them.

    mixer        "v2" (released models), "v1" or "none": see MambaMixer
    divide_out   halve the sum of both directions (all released models but the first)
    layer_scale  start of the mixers' gamma; None for no gamma
    """

    mixer: MixerKind = "v2"
    divide_out: bool = True
    layer_scale: float | None = None


class Vim(ClassTokenBackbone):
    """See VimConfig."""

    family = "vim"
    config: VimConfig

    def __init__(self, config: VimConfig) -> None:
        super().__init__(config)
        self.add_tokens()
        self.add_blocks(kind=config.mixer, halve=config.divide_out, gamma=config.layer_scale)
        self.head = classifier(config.embed_dim, config.num_classes)


# Checkpoints: which configuration a file holds, and how its position embeddings are resized.

TINY = VimConfig(embed_dim=192)
SMALL = VimConfig(embed_dim=384)
BASE = VimConfig(embed_dim=768)
VARIANTS = {
    "vim_tiny": TINY,
    "vim_small": SMALL,
    "vim_base": BASE,
    "vim_tiny_plus": replace(TINY, stride=8),
    "vim_small_plus": replace(SMALL, stride=8),
    "vim_base_plus": replace(BASE, stride=8),
    "vim_tiny_73p1": replace(TINY, class_token="head", divide_out=False, rope=True),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are Vim's keys, and no name says that they are those of VideoMamba, which has the same ones."""
    return is_mamba(shapes) and "pos_embed_cls" not in shapes and named_families(hints) != {"videomamba"}


def configure(shapes: Shapes, hints: Hints) -> VimConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    What keys cannot tell is taken from the authors' model name if the file has it, else as in the released models (the
    first release if there are rope tables). Raises CheckpointError.
    """
    if hints.variant:
        config = VARIANTS[hints.variant]
        return as_published(config, shapes, hints, "Vim", extra_positions=len(CLASS_TOKENS[config.class_token]))
    token, divide_out = _hidden_choices(shapes, hints)
    # The authors' names say "rope_also_residual" when residuals are turned too, as in the first release.
    rope_residual = "rope" not in hints.model_name or "also_residual" in hints.model_name
    return VimConfig(
        **read_sizes(shapes, hints, VARIANTS, "Vim", extra_positions=len(CLASS_TOKENS[token])),
        class_token=token,
        mixer="v2" if mixer_has(shapes, "D_b") else "v1" if mixer_has(shapes, "A_b_log") else "none",
        divide_out=divide_out,
        layer_scale=1.0 if mixer_has(shapes, "gamma") else None,  # only where training starts, which is over
        rope="rope.freqs_cos" in shapes,
        rope_residual=stated_flag(hints, "if_rope_residual", rope_residual),
    )


def _hidden_choices(shapes: Shapes, hints: Hints) -> tuple[ClassToken, bool]:
    """Place of the class token and whether outputs are halved: no shape depends on them where there is one token."""
    place: ClassToken
    if any(word in hints.model_name for word in ("clstok", "cls_token", "div2")):
        middle, divide_out = "mid" in hints.model_name, "div2" in hints.model_name
    elif "rope.freqs_cos" in shapes:
        middle, divide_out = False, False
    else:
        middle, divide_out = True, True
    place = "middle" if stated_flag(hints, "use_middle_cls_token", middle) else "head"
    if "cls_token_head" in shapes:
        place = "double"
    elif "cls_token" not in shapes:
        place = "none"
        pools = hints.settings.get("final_pool_type", ("mean",))
        if pools != ("mean",):
            raise CheckpointError(f"the file says final_pool_type {listing(pools)}, and here it is the mean")
    # `if_devide_out` is what the authors' base model sets by mistake; nothing reads it.
    return place, stated_flag(hints, "if_divide_out", divide_out)


def resize(state: dict[str, Tensor], config: VimConfig, image_size: int) -> tuple[dict[str, Tensor], VimConfig]:
    """For images of another size: bicubic for the patches' positions, class tokens taken from their true index.

    UsageError for rotary tables that are not those of the first release: nothing says what they are for another grid.
    """
    check_side(image_size, config.patch_size, config.stride)
    new = patch_grid((image_size, image_size), config.patch_size, config.stride)
    old = patch_grid(config.image_size, config.patch_size, config.stride)
    old_class, new_class = (class_positions(config.class_token, math.prod(grid)) for grid in (old, new))
    moved, resized = resize_positions(state["pos_embed"], config, image_size, old_class=old_class, new_class=new_class)
    changed = {**state, "pos_embed": moved}
    if config.rope:
        names = ("rope.freqs_cos", "rope.freqs_sin")
        for name, known in zip(names, rotary_tables(config.embed_dim, old), strict=True):
            if not torch.allclose(state[name].float(), known, atol=_HALF_PRECISION):
                raise UsageError(
                    f"the rotary tables for {old[0]} x {old[1]} patches are others than those of the first Vim "
                    "release, so they cannot be made for another image size",
                    where=name,
                )
        changed |= zip(names, rotary_tables(config.embed_dim, new), strict=True)
    return changed, resized


_HALF_PRECISION = 2e-3  # a cosine stored in 8 bits of mantissa is as far from the true one


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a Vim file is a weight, under the name that we use too."""
    return state


VIM: Family = Family(
    name="vim",
    title="Vision Mamba (Vim)",
    matches=matches,
    configure=configure,
    build=Vim,
    config_class=VimConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
