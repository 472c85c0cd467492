"""PlainMamba checkpoints: which configuration a file holds, and how its position embeddings are resized."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import Family, Hints, Shapes, resize_grid
from ssmprune_cli.models.plainmamba.model import PlainMamba, PlainMambaConfig

L1 = PlainMambaConfig(embed_dim=192, depth=24, stem_convs=1, dw_layers=(0,))
VARIANTS = {
    "plainmamba_l1": L1,
    "plainmamba_l2": PlainMambaConfig(embed_dim=384, depth=24, stem_convs=2),
    "plainmamba_l3": PlainMambaConfig(embed_dim=448, depth=36, stem_convs=2),
}


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are PlainMamba's keys: no other family has weights for the directions of a scan's steps."""
    return any(key.endswith("layers.0.mamba.direction_Bs") for key in shapes)


def configure(shapes: Shapes, hints: Hints) -> PlainMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    Raises CheckpointError, also for detection and segmentation models, which have no classifier.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a PlainMamba classifier: the weight {key} {problem}")
        return found

    num_classes = shape("head.fc.weight", 2)[0]
    if hints.variant:
        given = VARIANTS[hints.variant]
        size = (hints.image_size, hints.image_size) if hints.image_size else given.image_size
        crop = hints.eval_crop_ratio or given.eval_crop_ratio
        return replace(given, image_size=size, num_classes=num_classes, eval_crop_ratio=crop)
    embed_dim, _, half_patch, _ = shape("backbone.patch_embed.projection.weight", 4)
    d_inner, d_state = shape("backbone.layers.0.mamba.A_log", 2)
    dt_rank = shape("backbone.layers.0.mamba.dt_proj.weight", 2)[1]
    depth = max(_numbers(shapes, r"backbone\.layers\.(\d+)\.mamba\.A_log")) + 1
    side = _image_side(shape("backbone.pos_embed", 3)[1], 2 * half_patch, hints.image_size)
    try:
        return PlainMambaConfig(
            image_size=(side, side),
            patch_size=2 * half_patch,
            embed_dim=embed_dim,
            depth=depth,
            # Each has three layers, of which only the first one's weight is four-dimensional.
            stem_convs=sum(
                bool(re.match(r"backbone\.patch_embed\.convs", key)) and len(shapes[key]) == 4 for key in shapes
            ),
            dw_layers=_numbers(shapes, r"backbone\.layers\.(\d+)\.dw\.0\.weight"),
            # The norm of the last block's output is the final one, so whether it was among them is in no key.
            out_indices=(*_numbers(shapes, r"backbone\.norm_layer(\d+)\.weight"), -1),
            num_classes=num_classes,
            d_state=d_state,
            d_conv=shape("backbone.layers.0.mamba.conv2d.weight", 4)[2],
            d_inner=None if d_inner == 2 * embed_dim else d_inner,
            dt_rank=None if dt_rank == math.ceil(embed_dim / 16) else dt_rank,
            eval_crop_ratio=hints.eval_crop_ratio or L1.eval_crop_ratio,
        )
    except UsageError as error:
        raise CheckpointError(f"not a PlainMamba classifier: {error.what}") from error


def _numbers(shapes: Shapes, pattern: str) -> tuple[int, ...]:
    """The numbers that `pattern` finds in keys that it matches as a whole."""
    return tuple(int(found[1]) for found in (re.fullmatch(pattern, key) for key in shapes) if found)


def _image_side(patches: int, patch_size: int, known_side: int | None) -> int:
    """The side of a square image that gives `patches`: the known one, 224 as published, or the one without padding."""
    rows = math.isqrt(patches)
    for side in (known_side, L1.image_size[0], rows * patch_size):
        if side and math.prod(PlainMambaConfig(image_size=(side, side), patch_size=patch_size).grid) == patches:
            return side
    raise CheckpointError(f"the {patches} patch positions of pos_embed are not those of a square image")


def resize(
    state: dict[str, Tensor], config: PlainMambaConfig, image_size: int | tuple[int, int]
) -> tuple[dict[str, Tensor], PlainMambaConfig]:
    """For images of another size (a side, or height and width): bicubic, as the authors do on the fly."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    resized = replace(config, image_size=size)
    embedding = resize_grid(state["backbone.pos_embed"], config.grid, resized.grid)
    return {**state, "backbone.pos_embed": embedding}, resized


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
)
