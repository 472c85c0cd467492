"""MambaVision checkpoints: which configuration a file holds. Heads and windows are in no weight."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models.common import Family, Hints, Shapes, count_numbered, image_fields, no_stride
from ssmprune_cli.models.mambavision.model import CONVOLVED, MambaVision, MambaVisionConfig
from ssmprune_cli.models.vmamba import image_side

TINY = MambaVisionConfig()
BASE = MambaVisionConfig(in_dim=64, embed_dim=128, depths=(3, 3, 10, 5), layer_scale=1e-5)
LARGE = replace(BASE, embed_dim=196, num_heads=(4, 8, 16, 32))
VARIANTS = {
    "mambavision_tiny": TINY,
    "mambavision_tiny2": replace(TINY, depths=(1, 3, 11, 4), eval_crop_ratio=0.98),
    "mambavision_small": replace(TINY, in_dim=64, embed_dim=96, depths=(3, 3, 7, 5), eval_crop_ratio=0.93),
    "mambavision_base": BASE,
    "mambavision_large": LARGE,
    "mambavision_large2": replace(LARGE, depths=(3, 3, 12, 5)),
}
# What no weight's shape tells, and only one way is computed here.
COMPUTES = {"qk_norm": frozenset({False}), "layer_scale_conv": frozenset({None, "none"})}
_MIXED = f"levels.{CONVOLVED}.blocks.0"


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are MambaVision's keys, which no other family has."""
    return f"{_MIXED}.mixer.conv1d_x.weight" in shapes and f"{_MIXED}.mixer.conv1d_z.weight" in shapes


def configure(shapes: Shapes, hints: Hints) -> MambaVisionConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes of the file.

    Raises CheckpointError, also where nothing says how many heads there are, or how large windows are.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a MambaVision: the weight {key} {problem}")
        return found

    no_stride(hints, "MambaVision")
    in_dim, embed_dim = (shape(f"patch_embed.conv_down.{place}.weight", 4)[0] for place in (0, 3))
    num_classes = shape("head.weight", 2)[0]
    depths = tuple(count_numbered(shapes, rf"levels\.{level}\.blocks\.(\d+)\.") for level in range(4))
    alike = [each for each in VARIANTS.values() if (each.embed_dim, each.depths) == (embed_dim, depths)]
    if hints.variant:
        alike = [VARIANTS[hints.variant]]
    side = image_side(hints, alike, "MambaVision")
    published = alike[0] if alike and side == alike[0].image_size[0] else None
    heads = _stated(hints, "num_heads") or (alike[0].num_heads if alike else None)
    windows = _stated(hints, "window_size")
    if heads is None or (windows is None and published is None):
        unknown = "how many heads there are" if heads is None else "how large windows are"
        raise CheckpointError(
            f"neither the weights nor the file say {unknown}",
            hint="Save the file with both: {'model': weights, 'args': {'num_heads': [...], 'window_size': [...]}}.",
        )
    try:
        config = MambaVisionConfig(
            image_size=(side, side),
            in_dim=in_dim,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=heads,
            num_classes=num_classes,
            d_state=shape(f"{_MIXED}.mixer.A_log", 2)[1],
            mlp_ratio=shape(f"{_MIXED}.mlp.fc1.weight", 2)[0] / max(embed_dim << CONVOLVED, 1),
            layer_scale=1e-5 if f"{_MIXED}.gamma_1" in shapes else None,  # only where training starts, which is over
            **image_fields(hints, published),
        )
    except UsageError as error:
        raise CheckpointError(f"not a MambaVision: {error.what}") from error
    if hints.variant:
        given = VARIANTS[hints.variant]
        images = image_fields(hints, published)
        return replace(given, image_size=config.image_size, num_classes=num_classes, **images)
    _check_windows(config, windows)
    return config


def _stated(hints: Hints, name: str) -> tuple[int, ...] | None:
    """Four numbers that the file states. CheckpointError if it states something else."""
    values = hints.settings.get(name, ())
    if not values:
        return None
    found = values[0]
    if len(values) != 1 or not isinstance(found, tuple) or len(found) != 4 or not all(type(n) is int for n in found):
        raise CheckpointError(f"the file says {name} {listing(values)}, which are not four numbers")
    return found


def _check_windows(config: MambaVisionConfig, windows: tuple[int, ...] | None) -> None:
    """CheckpointError unless each window is a whole grid, as in every published model."""
    for level in range(CONVOLVED, 4):
        grid = config.grid(level)
        if windows is not None and (windows[level], windows[level]) != grid:
            raise CheckpointError(
                f"its windows of {windows[level]} x {windows[level]} places are not the grid of {grid[0]} x {grid[1]} "
                f"that an image of {config.image_size[0]} pixels has there, which is not supported",
                hint="Give the image size that the model was trained with: `--image-size 512`, for example.",
            )


def resize(
    state: dict[str, Tensor], config: MambaVisionConfig, image_size: int
) -> tuple[dict[str, Tensor], MambaVisionConfig]:
    """The same for the same size. UsageError for another one: its grids are no windows of the trained size."""
    if (image_size, image_size) != config.image_size:
        rows, columns = config.grid(CONVOLVED)
        raise UsageError(
            f"a MambaVision is for images of one size: its windows have {rows} x {columns} places, which are the whole "
            f"grid at {config.image_size[0]} pixels only",
            hint=f"Give images of {config.image_size[0]} pixels.",
        )
    return state, config


def fills(config: MambaVisionConfig, side: int) -> bool:
    """Whether windows are whole grids for square images of `side` pixels."""
    return (side, side) == config.image_size


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a MambaVision file is a weight, under the name that we use too."""
    return state


MAMBAVISION: Family = Family(
    name="mambavision",
    title="MambaVision",
    matches=matches,
    configure=configure,
    build=MambaVision,
    config_class=MambaVisionConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
