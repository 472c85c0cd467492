"""PlainMamba checkpoints: which configuration a file holds, and how its position embeddings are resized."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import (
    MAX_SIDE,
    Family,
    Hints,
    Shapes,
    count_numbered,
    image_fields,
    no_stride,
    resize_grid,
    square_side,
)
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig

C = TypeVar("C", bound=PlainMambaConfig)

L1 = PlainMambaConfig(embed_dim=192, depth=24, stem_convs=1, dw_layers=(0,))
VARIANTS = {
    "plainmamba_l1": L1,
    "plainmamba_l2": PlainMambaConfig(embed_dim=384, depth=24, stem_convs=2),
    "plainmamba_l3": PlainMambaConfig(embed_dim=448, depth=36, stem_convs=2),
}

# What no weight's shape tells, and only one way is computed here: SiLU in the mixer.
COMPUTES = {name: frozenset({"silu", "swish"}) for name in ("act_layer", "hidden_act", "activation")}


# What names of a dense model begin with, here and in the authors' files: its encoder has the same ones.
_DENSE = ("encoder.", "decode_head.", "neck.", "rpn_head.", "roi_head.")


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are PlainMamba's keys: no other family has weights for the directions of a scan's steps."""
    ours = any(key.endswith("layers.0.mamba.direction_Bs") for key in shapes)
    return ours and ("head.fc.weight" in shapes or not any(key.startswith(_DENSE) for key in shapes))


def configure(shapes: Shapes, hints: Hints) -> PlainMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError, also for an encoder, which has no classifier.
    """
    no_stride(hints, "PlainMamba")
    num_classes = _shape(shapes, "head.fc.weight", 2)[0]
    positions = _shape(shapes, "backbone.pos_embed", 3)[1]
    if hints.variant:
        config = VARIANTS[hints.variant]
        side = _image_side(positions, config.patch_size, hints)
        images = image_fields(hints, config if side == config.image_size[0] else None)
        return replace(config, image_size=(side, side), num_classes=num_classes, **images)
    embed_dim, _, half_patch, _ = _shape(shapes, "backbone.patch_embed.projection.weight", 4)
    depth = count_numbered(shapes, r"backbone\.layers\.(\d+)\.mamba\.A_log$")
    side = _image_side(positions, 2 * half_patch, hints)
    sizes = [(config.patch_size, config.embed_dim, config.depth, config.image_size[0]) for config in VARIANTS.values()]
    published = L1 if (2 * half_patch, embed_dim, depth, side) in sizes else None
    known = image_fields(hints, published)
    return configured(shapes, PlainMambaConfig, image_size=(side, side), num_classes=num_classes, **known)


def configure_encoder(shapes: Shapes, hints: Hints) -> PlainMambaConfig:
    """The configuration of an encoder with these shapes. Tokens are counted for `hints.image_size`: give one.

    Raises CheckpointError.
    """
    assert hints.image_size is not None
    rows = square_side(_shape(shapes, "backbone.pos_embed", 3)[1])
    size = (hints.image_size, hints.image_size)
    return configured(shapes, PlainMambaConfig, image_size=size, num_classes=0, positions=(rows, rows))


def configured(shapes: Shapes, kind: type[C], **known: Any) -> C:
    """The configuration of a PlainMamba of this kind with what is `known`, the rest from `shapes`. CheckpointError."""
    embed_dim, _, half_patch, _ = _shape(shapes, "backbone.patch_embed.projection.weight", 4)
    d_inner, d_state = _shape(shapes, "backbone.layers.0.mamba.A_log", 2)
    dt_rank = _shape(shapes, "backbone.layers.0.mamba.dt_proj.weight", 2)[1]
    try:
        told = {
            "patch_size": 2 * half_patch,
            "embed_dim": embed_dim,
            "depth": count_numbered(shapes, r"backbone\.layers\.(\d+)\.mamba\.A_log$"),
            # Each has three layers, of which only the first one's weight is four-dimensional.
            "stem_convs": sum(
                bool(re.match(r"backbone\.patch_embed\.convs", key)) and len(shapes[key]) == 4 for key in shapes
            ),
            "dw_layers": _numbers(shapes, r"backbone\.layers\.(\d+)\.dw\.0\.weight"),
            # The norm of the last block's output is the final one, so whether it was among them is in no key.
            "out_indices": (*_numbers(shapes, r"backbone\.norm_layer(\d+)\.weight"), -1),
            "d_state": d_state,
            "d_conv": _shape(shapes, "backbone.layers.0.mamba.conv2d.weight", 4)[2],
            "d_inner": None if d_inner == 2 * embed_dim else d_inner,
            "dt_rank": None if dt_rank == math.ceil(embed_dim / 16) else dt_rank,
        }
        return kind(**{**told, **known})
    except UsageError as error:
        raise CheckpointError(f"not a PlainMamba: {error.what}") from error


def _shape(shapes: Shapes, key: str, dimensions: int) -> tuple[int, ...]:
    found = shapes.get(key)
    if found is None or len(found) != dimensions:
        problem = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(f"not a PlainMamba classifier: the weight {key} {problem}")
    return found


def _numbers(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """The numbers that `pattern` finds in keys that it matches as a whole."""
    return tuple(int(found[1]) for found in (re.fullmatch(pattern, key) for key in shapes) if found)


def _image_side(positions: int, patch: int, hints: Hints) -> int:
    """The side of the square images that the weights are for: as stated, else as asked for, else without padding.

    Images are padded to fill the patches, so several sides give as many positions.
    """
    rows = square_side(positions)
    fits = [side for side in (hints.image_size, hints.asked_size) if side and -(-side // patch) == rows]
    if hints.image_size is None or hints.image_size in fits:
        return fits[0] if fits else rows * patch
    if hints.asked_size is not None:
        return rows * patch
    raise CheckpointError(
        f"the file says that images have {hints.image_size} pixels, which do not give {positions} patch positions",
        hint=f"{positions} patch positions and {patch}-pixel patches fit `--image-size {rows * patch}`.",
    )


def resize(
    state: dict[str, Tensor], config: PlainMambaConfig, image_size: int | tuple[int, int]
) -> tuple[dict[str, Tensor], PlainMambaConfig]:
    """For images of another size (a side, or height and width): bicubic, as the authors do on the fly."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not 1 <= min(size) <= max(size) <= MAX_SIDE:
        raise UsageError(f"images of {size[0]} x {size[1]} pixels are not possible", hint=f"Up to {MAX_SIDE} are.")
    resized = replace(config, image_size=size)
    embedding = resize_grid(state["backbone.pos_embed"], config.grid, resized.grid)
    return {**state, "backbone.pos_embed": embedding}, resized


def fills(config: PlainMambaConfig, side: int) -> bool:
    """Whether square images of `side` pixels need no padding."""
    return side > 0 and side % config.patch_size == 0


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what mmcv's moving average leaves in the file: the weights proper already hold it."""
    return {key: value for key, value in state.items() if not key.startswith("ema_")}


PLAINMAMBA: Family = Family(
    name="plainmamba",
    title="PlainMamba",
    matches=matches,
    configure=configure,
    build=PlainMamba,
    config_class=PlainMambaConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
