"""VMamba checkpoints: which configuration a file holds, and the names and shapes that older files have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import MAX_SIDE, Family, Hints, Shapes, count_numbered, image_fields, no_stride
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig

Config = TypeVar("Config", bound=VMambaConfig)

S1 = VMambaConfig()
S2 = replace(S1, ssm_ratio=2.0)
V0 = VMambaConfig(
    patch_embed="v1", downsample="v1", d_state=16, ssm_ratio=2.0, gated=True, conv_bias=True, mlp_ratio=0.0
)
VARIANTS = {
    "vmamba_tiny_s1l8": S1,
    "vmamba_tiny_s2l5": replace(S2, depths=(2, 2, 5, 2)),
    "vmamba_small_s2l15": replace(S2, depths=(2, 2, 15, 2)),
    "vmamba_small_s1l20": replace(S1, depths=(2, 2, 20, 2)),
    "vmamba_base_s2l15": replace(S2, depths=(2, 2, 15, 2), embed_dim=128),
    "vmamba_base_s1l20": replace(S1, depths=(2, 2, 20, 2), embed_dim=128),
    "vanilla_vmamba_tiny": replace(V0, depths=(2, 2, 9, 2)),
    "vanilla_vmamba_small": replace(V0, depths=(2, 2, 27, 2)),
    "vanilla_vmamba_base": replace(V0, depths=(2, 2, 27, 2), embed_dim=128),
}

# Names of the authors' ways to write one computation: how the scan runs, its precision, a gate (the weights tell).
_FORWARD_TYPES = frozenset(
    base + ending
    for base in ("v0", "v0_seq", "v1", "v2", "v3", "v4", "v5", "v01", "v02", "v03", "v04", "v05")
    for ending in ("", "_noz", "_no32", "_no32_noz", "_noz_no32")
)
_NORMS = frozenset({"ln", "ln2d", "layernorm", "layernorm2d"})
# What no weight's shape tells, and only one way is computed here.
COMPUTES = {
    "ssm_act_layer": frozenset({"silu", "swish"}),
    "mlp_act_layer": frozenset({"gelu"}),
    "act_layer": frozenset({"silu", "swish"}),
    "ssm_forwardtype": _FORWARD_TYPES,
    "forward_type": _FORWARD_TYPES,
    "norm_layer": _NORMS,
    "gmlp": frozenset({False}),
    "posembed": frozenset({False}),
}

# Names in files of the first code release, and what they are now.
_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^(norm|head)\."), r"classifier.\1."),
)
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")
# Parts that EfficientVMamba, MedMamba and LocalVMamba add to blocks whose other names are VMamba's.
_OTHERS = (".conv_branch.", ".conv33conv33conv11.", ".multi_scan.")


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are VMamba's keys, old or new."""
    return todays_names(shapes).get("layers.0.blocks.0.op.A_logs") is not None and not any(
        part in key for part in _OTHERS for key in shapes
    )


def configure(shapes: Shapes, hints: Hints) -> VMambaConfig:
    """See `read_config`."""
    return read_config(shapes, hints, VARIANTS, VMambaConfig, "VMamba")


def read_config(shapes: Shapes, hints: Hints, variants: Mapping[str, Config], kind: type[Config], model: str) -> Config:
    """The configuration of this `kind` that fits `shapes`; with `hints.variant` that one of `variants`, for the classes
    and outputs of the file. `model` is the family in messages.

    No weight depends on the image size: it is stated, published or asked for. Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a {model}: the weight {key} {problem}")
        return found

    no_stride(hints, model)
    op = "layers.0.blocks.0.op"
    embed_dim = shape("layers.0.blocks.0.norm.weight", 1)[0]
    d_inner = shape(f"{op}.conv2d.weight", 4)[0]
    d_state = shape(f"{op}.A_logs", 2)[1]
    patch = shape("patch_embed.0.weight", 4)[2]
    depths = stage_depths(shapes)
    outs = tuple(stage for stage in range(len(depths)) if f"outnorm{stage}.weight" in shapes)
    is_classifier = "classifier.head.weight" in shapes or not outs
    num_classes = shape("classifier.head.weight", 2)[0] if is_classifier else 0
    alike = [each for each in variants.values() if (each.embed_dim, each.depths) == (embed_dim, depths)]
    if hints.variant:
        alike = [variants[hints.variant]]
    side = image_side(hints, alike, model)
    images = image_fields(hints, alike[0] if alike and side == alike[0].image_size[0] else None)
    if hints.variant:
        given = variants[hints.variant]
        return replace(given, image_size=(side, side), num_classes=num_classes, out_stages=outs, **images)
    has_mlp = "layers.0.blocks.0.mlp.fc1.weight" in shapes
    return kind(
        image_size=(side, side),
        patch_embed="v1" if patch == 4 else "v2",
        downsample="v1" if "layers.0.downsample.reduction.weight" in shapes else "v3",
        embed_dim=embed_dim,
        depths=depths,
        num_classes=num_classes,
        d_state=d_state,
        ssm_ratio=d_inner / embed_dim,
        gated=shape(f"{op}.in_proj.weight", 2)[0] == 2 * d_inner,
        conv_bias=f"{op}.conv2d.bias" in shapes,
        mlp_ratio=shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / embed_dim if has_mlp else 0.0,
        out_stages=outs,
        **images,
    )


def image_side(hints: Hints, published: Sequence[Any], model: str) -> int:
    """The side in pixels, which is in no weight of a `model`: as stated, as the first of `published`, as asked for.
    CheckpointError without."""
    if hints.image_size is not None:
        return hints.image_size
    if published:
        side: int = published[0].image_size[0]
        return side
    if hints.asked_size is None:
        raise CheckpointError(
            "neither the weights nor the file say which image size the model is for",
            hint=f"Every size fits a {model}. Give the one that it was trained with: `--image-size 224`, for example.",
        )
    return hints.asked_size


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's names, and linear weights with two dimensions where the file has them as 1x1 convolutions."""
    names = todays_names(state)
    if len(names) < len(state):
        twice = sorted(set(state) - set(names.values()))
        raise CheckpointError(f"has these weights under their old and new names: {', '.join(twice[:5])}")
    found = {}
    for name, key in names.items():
        value = state[key]
        one_by_one = _LINEAR.search(name) and value.ndim == 4 and value.shape[2:] == (1, 1)
        found[name] = value.flatten(1) if one_by_one else value
    return found


def resize(state: dict[str, Tensor], config: Config, image_size: int) -> tuple[dict[str, Tensor], Config]:
    """For images of another size: the weights stay, as none of them depends on the place."""
    if image_size > MAX_SIDE:
        raise UsageError(f"images of {image_size} pixels are not possible", hint=f"Up to {MAX_SIDE} are.")
    return state, replace(config, image_size=(image_size, image_size))


def fills(config: VMambaConfig, side: int) -> bool:
    """Whether patches of 4 pixels, or two strides of 2, cover square images of `side` pixels exactly."""
    return side > 0 and side % 4 == 0


def todays_names(keys: Shapes | dict[str, Tensor]) -> dict[str, str]:
    """Today's name of every key of a file, to that key. A backbone saved with its detector's prefix loses it."""
    prefix = "backbone." if keys and all(key.startswith("backbone.") for key in keys) else ""
    names = {}
    for key in keys:
        name = key.removeprefix(prefix)
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        names[name] = key
    return names


def stage_depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage that has any."""
    stages = count_numbered(shapes, r"layers\.(\d+)\.blocks\.")
    return tuple(count_numbered(shapes, rf"layers\.{stage}\.blocks\.(\d+)\.") for stage in range(stages))


VMAMBA: Family = Family(
    name="vmamba",
    title="VMamba",
    matches=matches,
    configure=configure,
    build=VMamba,
    config_class=VMambaConfig,
    remap=remap,
    variants=VARIANTS,
    resize=resize,
    fills=fills,
    computes=COMPUTES,
)
