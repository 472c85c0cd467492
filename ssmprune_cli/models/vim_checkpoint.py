"""Vim checkpoints: which configuration a file holds, and how its position embeddings are resized."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from ssmprune_cli.errors import CheckpointError
from ssmprune_cli.models.base import Family, Hints, Shapes
from ssmprune_cli.models.layers import patch_grid, resize_grid, rotary_tables
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
    """Whether these are Vim's keys. VideoMamba's image models have the same ones, so a name that says so decides."""
    if "videomamba" in f"{hints.filename} {hints.model_name}".lower().replace("_", ""):
        return False
    wanted = ("pos_embed", "layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight", "norm_f.weight")
    patch = shapes.get("patch_embed.proj.weight", ())
    return all(key in shapes for key in wanted) and "pos_embed_cls" not in shapes and len(patch) == 4


def configure(shapes: Shapes, hints: Hints) -> VimConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    What keys cannot tell is taken from the authors' model name if the file has it, else as in the released models (the
    first release if there are rope tables). Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a Vim classifier: the weight {key} {problem}")
        return found

    num_classes = shape("head.weight", 2)[0]
    if hints.variant:
        given = VARIANTS[hints.variant]
        size = (hints.image_size, hints.image_size) if hints.image_size else given.image_size
        crop = hints.eval_crop_ratio or given.eval_crop_ratio
        return replace(given, image_size=size, num_classes=num_classes, eval_crop_ratio=crop)
    embed_dim, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    d_inner, d_state = shape("layers.0.mixer.A_log", 2)
    dt_rank = shape("layers.0.mixer.dt_proj.weight", 2)[1]
    blocks = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.") and key.split(".")[1].isdigit()}
    token, divide_out = _hidden_choices(shapes, hints.model_name)
    patches = shape("pos_embed", 3)[1] - len(CLASS_TOKENS[token])
    side, stride = _image_size(patches, patch_size, hints.image_size)
    return VimConfig(
        image_size=(side, side),
        patch_size=patch_size,
        stride=stride,
        embed_dim=embed_dim,
        depth=max(blocks) + 1,
        num_classes=num_classes,
        d_state=d_state,
        d_conv=shape("layers.0.mixer.conv1d.weight", 3)[2],
        d_inner=None if d_inner == 2 * embed_dim else d_inner,
        dt_rank=None if dt_rank == math.ceil(embed_dim / 16) else dt_rank,
        class_token=token,
        mixer="v2" if _mixer_has(shapes, "D_b") else "v1" if _mixer_has(shapes, "A_b_log") else "none",
        divide_out=divide_out,
        layer_scale=1.0 if _mixer_has(shapes, "gamma") else None,  # only where training starts, which is over
        norm="layer" if "norm_f.bias" in shapes else "rms",
        rope="rope.freqs_cos" in shapes,
        # The authors' names say "rope_also_residual" when residuals are turned too, as in the first release.
        rope_residual="rope" not in hints.model_name or "also_residual" in hints.model_name,
        eval_crop_ratio=hints.eval_crop_ratio or TINY.eval_crop_ratio,
    )


def _mixer_has(shapes: Shapes, name: str) -> bool:
    return f"layers.0.mixer.{name}" in shapes


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


def _image_size(patches: int, patch_size: int, known_side: int | None) -> tuple[int, int]:
    """Image side and stride that give `patches`.

    Only the number is in the file, so the likeliest pair is taken: the side that the container names, then 224 as
    published, with patches that meet or overlap; then any square of patches that meet.
    """
    for side in (known_side, 224):
        for stride in (patch_size // part for part in (1, 2, 4) if patch_size % part == 0):
            if side and side >= patch_size and math.prod(patch_grid((side, side), patch_size, stride)) == patches:
                return side, stride
    rows = math.isqrt(max(patches, 0))
    if rows == 0 or rows * rows != patches:
        raise CheckpointError(f"the {patches} patch positions of pos_embed are not those of a square image")
    return rows * patch_size, patch_size


def resize(state: dict[str, Tensor], config: VimConfig, image_size: int) -> tuple[dict[str, Tensor], VimConfig]:
    """For images of another size: bicubic for the patches' positions, class tokens taken from their true index."""
    resized = replace(config, image_size=(image_size, image_size))
    old, new = (patch_grid(each.image_size, each.patch_size, each.stride) for each in (config, resized))
    old_class, new_class = (class_positions(config.class_token, math.prod(grid)) for grid in (old, new))
    embedding = state["pos_embed"]
    is_patch = torch.ones(embedding.shape[1], dtype=torch.bool)
    is_patch[list(old_class)] = False
    patches = resize_grid(embedding[:, is_patch], old, new)
    moved = torch.empty(1, patches.shape[1] + len(new_class), config.embed_dim, dtype=embedding.dtype)
    is_patch = torch.ones(moved.shape[1], dtype=torch.bool)
    is_patch[list(new_class)] = False
    moved[:, is_patch] = patches
    moved[:, list(new_class)] = embedding[:, list(old_class)]
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
