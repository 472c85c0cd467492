"""EfficientVMamba checkpoints: which configuration a file holds, and the names that older files have."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import MAX_SIDE, Family, Hints, Shapes, count_numbered, image_fields, no_stride
from ssmprune_cli.models.efficientvmamba.model import PIXELS, SCANNED, EfficientVMamba, EfficientVMambaConfig
from ssmprune_cli.models.vmamba import image_side, remap, todays_names

# The authors' settings name a width of 96 for the small model; 64 is that of the published weights.
VARIANTS = {
    "efficientvmamba_tiny": EfficientVMambaConfig(),
    "efficientvmamba_small": EfficientVMambaConfig(embed_dim=64),
    "efficientvmamba_base": EfficientVMambaConfig(embed_dim=96, depths=(2, 2, 9, 2)),
}
# What no weight's shape tells, and only one way is computed here.
COMPUTES = {
    "ssm_act_layer": frozenset({"silu", "swish"}),
    "step_size": frozenset({2}),
    "mlp_ratio": frozenset({0}),
    "patch_norm": frozenset({True}),
    "softmax_version": frozenset({False}),
    "shared_ssm": frozenset({False}),
}
_BLOCK = "layers.0.blocks.0"


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are EfficientVMamba's keys, old or new, which no other family has."""
    names = todays_names(shapes)
    return f"{_BLOCK}.op.A_logs" in names and f"{_BLOCK}.conv_branch.0.weight" in names


def configure(shapes: Shapes, hints: Hints) -> EfficientVMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and image size of the file.

    No weight depends on the image size: it is stated, published or asked for. Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not an EfficientVMamba: the weight {key} {problem}")
        return found

    no_stride(hints, "EfficientVMamba")
    embed_dim = shape("patch_embed.0.weight", 4)[0]
    d_inner, num_classes = shape(f"{_BLOCK}.op.conv2d.weight", 4)[0], shape("classifier.head.weight", 2)[0]
    depths = _depths(shapes)
    alike = [each for each in VARIANTS.values() if (each.embed_dim, each.depths) == (embed_dim, depths)]
    if hints.variant:
        alike = [VARIANTS[hints.variant]]
    side = image_side(hints, alike, "EfficientVMamba")
    images = image_fields(hints, alike[0] if alike and side == alike[0].image_size[0] else None)
    sizes = {"image_size": (side, side), "num_classes": num_classes, **images}
    try:
        if hints.variant:
            return replace(VARIANTS[hints.variant], **sizes)
        return EfficientVMambaConfig(
            embed_dim=embed_dim,
            depths=depths,
            d_state=shape(f"{_BLOCK}.op.A_logs", 2)[1],
            ssm_ratio=d_inner / embed_dim,
            **sizes,
        )
    except (UsageError, ZeroDivisionError) as error:
        raise CheckpointError(f"not an EfficientVMamba: {error}") from error


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage: those with scans are numbered from 0, those of convolutions from 1 (see ConvStage)."""
    scanned = [count_numbered(shapes, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(SCANNED)]
    convolved = []
    for stage in (2, 3):
        places = {key.split(".")[2] for key in shapes if key.startswith(f"layers.{stage}.") and ".conv_pw." in key}
        convolved.append(len(places))
    return (*scanned, *convolved)


def resize(
    state: dict[str, Tensor], config: EfficientVMambaConfig, image_size: int
) -> tuple[dict[str, Tensor], EfficientVMambaConfig]:
    """For images of another size: the weights stay, as none of them depends on the place. UsageError for a side whose
    grids have an odd number of rows."""
    if image_size > MAX_SIDE:
        raise UsageError(f"images of {image_size} pixels are not possible", hint=f"Up to {MAX_SIDE} are.")
    return state, replace(config, image_size=(image_size, image_size))


def fills(config: EfficientVMambaConfig, side: int) -> bool:
    """Whether every scan visits a quarter of the grid for square images of `side` pixels."""
    return side > 0 and side % PIXELS == 0


EFFICIENTVMAMBA: Family = Family(
    name="efficientvmamba",
    title="EfficientVMamba",
    matches=matches,
    configure=configure,
    build=EfficientVMamba,
    config_class=EfficientVMambaConfig,
    remap=remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
