"""MedMamba checkpoints: which configuration a file holds. The authors save the bare weights."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import MAX_SIDE, Family, Hints, Shapes, image_fields, no_stride
from ssmprune_cli.models.medmamba.model import MedMamba, MedMambaConfig
from ssmprune_cli.models.vmamba import image_side, stage_depths

VARIANTS = {
    "medmamba_tiny": MedMambaConfig(),
    "medmamba_small": MedMambaConfig(depths=(2, 2, 8, 2)),
    "medmamba_base": MedMambaConfig(embed_dim=128, depths=(2, 2, 12, 2)),
}
# What no weight's shape tells, and only one way is computed here.
COMPUTES = {"patch_norm": frozenset({True}), "ape": frozenset({False})}
_BLOCK = "layers.0.blocks.0"


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are MedMamba's keys, which no other family has."""
    return f"{_BLOCK}.self_attention.A_logs" in shapes and f"{_BLOCK}.conv33conv33conv11.1.weight" in shapes


def configure(shapes: Shapes, hints: Hints) -> MedMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    No weight depends on the image size: it is stated, published or asked for. Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a MedMamba: the weight {key} {problem}")
        return found

    no_stride(hints, "MedMamba")
    embed_dim, depths = shape("patch_embed.proj.weight", 4)[0], stage_depths(shapes)
    num_classes = shape("head.weight", 2)[0]
    alike = [each for each in VARIANTS.values() if (each.embed_dim, each.depths) == (embed_dim, depths)]
    if hints.variant:
        alike = [VARIANTS[hints.variant]]
    side = image_side(hints, alike, "MedMamba")
    images = image_fields(hints, MedMambaConfig())  # the authors train every model on images prepared so
    if hints.eval_crop_ratio is None and not (alike and side == alike[0].image_size[0]):
        images["eval_crop_ratio"] = None
    sizes = {"image_size": (side, side), "num_classes": num_classes, **images}
    try:
        if hints.variant:
            return replace(VARIANTS[hints.variant], **sizes)
        d_state = shape(f"{_BLOCK}.self_attention.A_logs", 2)[1]
        return MedMambaConfig(embed_dim=embed_dim, depths=depths, d_state=d_state, **sizes)
    except UsageError as error:
        raise CheckpointError(f"not a MedMamba: {error.what}") from error


def resize(
    state: dict[str, Tensor], config: MedMambaConfig, image_size: int
) -> tuple[dict[str, Tensor], MedMambaConfig]:
    """For images of another size: the weights stay, as none of them depends on the place. UsageError for a side that a
    downsampling would not divide."""
    if image_size > MAX_SIDE:
        raise UsageError(f"images of {image_size} pixels are not possible", hint=f"Up to {MAX_SIDE} are.")
    return state, replace(config, image_size=(image_size, image_size))


def fills(config: MedMambaConfig, side: int) -> bool:
    """Whether every stage's grid covers square images of `side` pixels exactly."""
    return side > 0 and side % config.pixels == 0


def _remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every key of a MedMamba file is a weight, under the name that we use too."""
    return state


MEDMAMBA: Family = Family(
    name="medmamba",
    title="MedMamba",
    matches=matches,
    configure=configure,
    build=MedMamba,
    config_class=MedMambaConfig,
    remap=_remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
