"""What the checkpoints of Vim, VideoMamba and Mamba-Reg have in common: sizes in shapes, names, position embeddings.

The image classifiers of VideoMamba have the keys and shapes of a Vim with one class token. They compute something else:
the class token comes first, and the sum of both directions is not halved. So a name has to tell them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssmprune_cli.errors import CheckpointError
from ssmprune_cli.models.common import Hints, Shapes, patch_grid, resize_grid
from ssmprune_cli.models.mamba.backbone import MambaConfig

Config = TypeVar("Config", bound=MambaConfig)


def is_mamba(shapes: Shapes) -> bool:
    """Whether these are the keys of image patches in a sequence of Mamba blocks."""
    wanted = ("pos_embed", "layers.0.mixer.A_log", "layers.0.mixer.in_proj.weight", "norm_f.weight")
    return all(key in shapes for key in wanted) and len(shapes.get("patch_embed.proj.weight", ())) == 4


def mixer_has(shapes: Shapes, name: str) -> bool:
    return f"layers.0.mixer.{name}" in shapes


def named_families(hints: Hints) -> set[str]:
    """Which of "vim" and "videomamba" the name of the file and the authors' name of the model speak of."""
    named = set()
    for name in (hints.filename.lower(), hints.model_name.lower()):
        if "videomamba" in re.sub(r"[ _-]", "", name):
            named.add("videomamba")
        if re.search(r"(?<![a-z])vim(?![a-z])", name):
            named.add("vim")
    return named


def shape_of(shapes: Shapes, key: str, dimensions: int, model: str) -> tuple[int, ...]:
    """The shape of the weight `key`. CheckpointError if it is not there or has not `dimensions`."""
    found = shapes.get(key)
    if found is None or len(found) != dimensions:
        problem = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(f"not a {model} classifier: the weight {key} {problem}")
    return found


def read_sizes(
    shapes: Shapes, hints: Hints, defaults: MambaConfig, model: str, *, extra_positions: int, overlap: bool = True
) -> dict[str, Any]:
    """The fields of MambaConfig that fit `shapes`. Raises CheckpointError.

    defaults         of the family, for what no shape tells
    model            the family in messages
    extra_positions  entries of pos_embed that belong to no patch
    overlap          whether the family has patches that overlap
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(shapes, key, dimensions, model)

    num_classes = shape("head.weight", 2)[0]
    embed_dim, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    d_inner, d_state = shape("layers.0.mixer.A_log", 2)
    dt_rank = shape("layers.0.mixer.dt_proj.weight", 2)[1]
    blocks = {int(key.split(".")[1]) for key in shapes if key.startswith("layers.") and key.split(".")[1].isdigit()}
    patches = shape("pos_embed", 3)[1] - extra_positions
    side, stride = _image_size(patches, patch_size, hints.image_size, overlap)
    return {
        "image_size": (side, side),
        "patch_size": patch_size,
        "stride": stride,
        "embed_dim": embed_dim,
        "depth": max(blocks) + 1,
        "num_classes": num_classes,
        "d_state": d_state,
        "d_conv": shape("layers.0.mixer.conv1d.weight", 3)[2],
        "d_inner": None if d_inner == 2 * embed_dim else d_inner,
        "dt_rank": None if dt_rank == math.ceil(embed_dim / 16) else dt_rank,
        "norm": "layer" if "norm_f.bias" in shapes else "rms",
        "eval_crop_ratio": hints.eval_crop_ratio or defaults.eval_crop_ratio,
    }


def as_published(config: Config, shapes: Shapes, hints: Hints, model: str) -> Config:
    """The published `config` for the classes of the file, and the image size and crop that its container names."""
    side = hints.image_size
    return replace(
        config,
        image_size=(side, side) if side else config.image_size,
        num_classes=shape_of(shapes, "head.weight", 2, model)[0],
        eval_crop_ratio=hints.eval_crop_ratio or config.eval_crop_ratio,
    )


def _image_size(patches: int, patch_size: int, known_side: int | None, overlap: bool) -> tuple[int, int]:
    """Image side and stride that give `patches`.

    Only the number is in the file, so the likeliest pair is taken: the side that the container names, then 224 as
    published, with patches that meet or overlap; then any square of patches that meet.
    """
    parts = [part for part in (1, 2, 4) if patch_size % part == 0] if overlap else [1]
    for side in (known_side, 224):
        for stride in (patch_size // part for part in parts):
            if side and side >= patch_size and math.prod(patch_grid((side, side), patch_size, stride)) == patches:
                return side, stride
    rows = math.isqrt(max(patches, 0))
    if rows == 0 or rows * rows != patches:
        raise CheckpointError(f"the {patches} patch positions of pos_embed are not those of a square image")
    return rows * patch_size, patch_size


def resize_positions(
    embedding: Tensor, config: Config, side: int, *, old_class: Sequence[int] = (), new_class: Sequence[int] = ()
) -> tuple[Tensor, Config]:
    """`embedding`, the pos_embed of a model of `config`, for square images of `side` pixels, and the configuration.

    Patches' positions are interpolated (bicubic); those at `old_class` move to `new_class` as they are.
    """
    resized = replace(config, image_size=(side, side))
    old, new = (patch_grid(each.image_size, each.patch_size, each.stride) for each in (config, resized))
    is_patch = torch.ones(embedding.shape[1], dtype=torch.bool)
    is_patch[list(old_class)] = False
    patches = resize_grid(embedding[:, is_patch], old, new)
    moved = torch.empty(1, patches.shape[1] + len(new_class), config.embed_dim, dtype=embedding.dtype)
    is_patch = torch.ones(moved.shape[1], dtype=torch.bool)
    is_patch[list(new_class)] = False
    moved[:, is_patch] = patches
    moved[:, list(new_class)] = embedding[:, list(old_class)]
    return moved, resized
