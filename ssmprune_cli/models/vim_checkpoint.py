"""Vim checkpoints: which configuration a file holds, and how its position embeddings are resized."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ssmprune_cli.models.base import Family, Hints, Shapes
from ssmprune_cli.models.layers import patch_grid, rotary_tables
from ssmprune_cli.models.mamba_checkpoint import (
    as_published,
    is_mamba,
    mixer_has,
    named_families,
    read_sizes,
    resize_positions,
)
from ssmprune_cli.models.vim import CLASS_TOKENS, ClassToken, Vim, VimConfig, class_positions

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
        return as_published(VARIANTS[hints.variant], shapes, hints, "Vim")
    token, divide_out = _hidden_choices(shapes, hints.model_name)
    return VimConfig(
        **read_sizes(shapes, hints, TINY, "Vim", extra_positions=len(CLASS_TOKENS[token])),
        class_token=token,
        mixer="v2" if mixer_has(shapes, "D_b") else "v1" if mixer_has(shapes, "A_b_log") else "none",
        divide_out=divide_out,
        layer_scale=1.0 if mixer_has(shapes, "gamma") else None,  # only where training starts, which is over
        rope="rope.freqs_cos" in shapes,
        # The authors' names say "rope_also_residual" when residuals are turned too, as in the first release.
        rope_residual="rope" not in hints.model_name or "also_residual" in hints.model_name,
    )


def _hidden_choices(shapes: Shapes, model_name: str) -> tuple[ClassToken, bool]:
    """Place of the class token and whether outputs are halved: no shape depends on them where there is one token."""
    place: ClassToken
    if any(word in model_name for word in ("clstok", "cls_token", "div2")):
        place, divide_out = "middle" if "mid" in model_name else "head", "div2" in model_name
    elif "rope.freqs_cos" in shapes:
        place, divide_out = "head", False
    else:
        place, divide_out = "middle", True
    if "cls_token_head" in shapes:
        place = "double"
    elif "cls_token" not in shapes:
        place = "none"
    return place, divide_out


def resize(state: dict[str, Tensor], config: VimConfig, image_size: int) -> tuple[dict[str, Tensor], VimConfig]:
    """For images of another size: bicubic for the patches' positions, class tokens taken from their true index."""
    new = patch_grid((image_size, image_size), config.patch_size, config.stride)
    old = patch_grid(config.image_size, config.patch_size, config.stride)
    old_class, new_class = (class_positions(config.class_token, math.prod(grid)) for grid in (old, new))
    moved, resized = resize_positions(state["pos_embed"], config, image_size, old_class=old_class, new_class=new_class)
    changed = {**state, "pos_embed": moved}
    if config.rope:
        changed["rope.freqs_cos"], changed["rope.freqs_sin"] = rotary_tables(config.embed_dim, new)
    return changed, resized


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
)
