"""What the checkpoints of Vim and its like have in common: sizes in shapes, names, position embeddings.

The image classifiers of VideoMamba have the keys and shapes of a Vim with one class token. They compute something else:
the class token comes first, and the sum of both directions is not halved. So a name has to tell them apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models.common import (
    Hints,
    Shapes,
    check_side,
    count_numbered,
    image_fields,
    patch_grid,
    resize_grid,
    settle,
)
from ssmprune_cli.models.mamba.backbone import MambaConfig

Config = TypeVar("Config", bound=MambaConfig)

MAX_PATCH = 1024  # pixels
# What no weight's shape tells, and only one way is computed here. The authors' activation is SiLU.
COMPUTES = {
    "act_layer": frozenset({"silu", "swish"}),
    "hidden_act": frozenset({"silu", "swish"}),
    "activation": frozenset({"silu", "swish"}),
    "if_bidirectional": frozenset({False}),
    "flip_img_sequences_ratio": frozenset({-1, 0}),
    "if_abs_pos_embed": frozenset({True}),
}


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


def stated_flag(hints: Hints, name: str, default: bool) -> bool:
    """What the file says of the constructor's argument `name`. CheckpointError if that is no truth value."""
    values = hints.settings.get(name, (default,))
    if len(values) != 1 or not isinstance(values[0], bool):
        raise CheckpointError(f"the file says {name} {listing(values)}, which is neither true nor false")
    return values[0]


def shape_of(shapes: Shapes, key: str, dimensions: int, model: str) -> tuple[int, ...]:
    """The shape of the weight `key`. CheckpointError if it is not there or has not `dimensions`."""
    found = shapes.get(key)
    if found is None or len(found) != dimensions:
        problem = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(f"not a {model} classifier: the weight {key} {problem}")
    return found


def read_sizes(
    shapes: Shapes,
    hints: Hints,
    variants: Mapping[str, Config],
    model: str,
    *,
    extra_positions: int,
    sides: Sequence[int] = (224,),
    branch: str = "",
) -> dict[str, Any]:
    """The fields of MambaConfig that fit `shapes`. Raises CheckpointError.

    variants         published configurations of the family
    model            the family in messages
    extra_positions  entries of pos_embed that belong to no patch
    sides            of the images that published files are for
    branch           what the names of the first branch's layers end in
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        return shape_of(shapes, key, dimensions, model)

    num_classes = shape("head.weight", 2)[0]
    embed_dim, _, patch_size, _ = shape("patch_embed.proj.weight", 4)
    d_inner, d_state = shape(f"layers.0.mixer.A_log{branch}", 2)
    dt_rank = shape(f"layers.0.mixer.dt_proj{branch}.weight", 2)[1]
    depth = count_numbered(shapes, r"layers\.(\d+)\.")
    if not 1 <= patch_size <= MAX_PATCH:
        raise CheckpointError(f"patches of {patch_size} pixels are not those of a {model}")
    alike = [
        config
        for config in variants.values()
        if (config.patch_size, config.embed_dim, config.depth) == (patch_size, embed_dim, depth)
    ]
    published = [(side, config.stride) for config in alike for side in sides]
    side, stride = settle(shape("pos_embed", 3)[1] - extra_positions, patch_size, hints, published)
    return {
        "image_size": (side, side),
        "patch_size": patch_size,
        "stride": stride,
        "embed_dim": embed_dim,
        "depth": depth,
        "num_classes": num_classes,
        "d_state": d_state,
        "d_conv": shape(f"layers.0.mixer.conv1d{branch}.weight", 3)[2],
        "d_inner": None if d_inner == 2 * embed_dim else d_inner,
        "dt_rank": None if dt_rank == math.ceil(embed_dim / 16) else dt_rank,
        "norm": "layer" if "norm_f.bias" in shapes else "rms",
        **image_fields(hints, alike[0] if (side, stride) in published else None),
    }


def as_published(
    config: Config, shapes: Shapes, hints: Hints, model: str, *, extra_positions: int, sides: Sequence[int] = (224,)
) -> Config:
    """The published `config` for the classes of the file, and the image size and preprocessing that are stated."""
    if hints.stride not in (None, config.stride):
        raise UsageError(f"`--variant` is a {model} with a stride of {config.stride}, not {hints.stride}")
    num_classes = shape_of(shapes, "head.weight", 2, model)[0]
    dim, _, patch, _ = shape_of(shapes, "patch_embed.proj.weight", 4, model)
    if (dim, patch) != (config.embed_dim, config.patch_size):
        return replace(config, num_classes=num_classes)  # what does not fit is listed weight by weight
    positions = shape_of(shapes, "pos_embed", 3, model)[1] - extra_positions
    published = {(side, config.stride) for side in sides}
    side, stride = settle(positions, config.patch_size, replace(hints, stride=config.stride), published)
    return replace(
        config,
        image_size=(side, side),
        num_classes=num_classes,
        **image_fields(hints, config if (side, stride) in published else None),
    )


def fills(config: MambaConfig, side: int) -> bool:
    """Whether patches cover square images of `side` pixels exactly."""
    return side >= config.patch_size and (side - config.patch_size) % config.stride == 0


def resize_positions(
    embedding: Tensor, config: Config, side: int, *, old_class: Sequence[int] = (), new_class: Sequence[int] = ()
) -> tuple[Tensor, Config]:
    """`embedding`, the pos_embed of a model of `config`, for square images of `side` pixels, and the configuration.

    Patches' positions are interpolated (bicubic); those at `old_class` move to `new_class` as they are.
    """
    check_side(side, config.patch_size, config.stride)
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
