"""VMamba checkpoints: which configuration a file holds, and the names and shapes that older files have."""

from __future__ import annotations

import re
from dataclasses import replace

from torch import Tensor

from ssmprune_cli.errors import CheckpointError
from ssmprune_cli.models.common import Family, Hints, Shapes
from ssmprune_cli.models.vmamba.model import VMamba, VMambaConfig

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

# Names in files of the first code release, and what they are now.
_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^(norm|head)\."), r"classifier.\1."),
)
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|reduction|head)\.weight$")
# Parts that EfficientVMamba and MedMamba add to blocks whose other names are VMamba's.
_OTHERS = (".conv_branch.", ".conv33conv33conv11.")


def matches(shapes: Shapes, hints: Hints) -> bool:
    """Whether these are VMamba's keys, old or new."""
    return _names(shapes).get("layers.0.blocks.0.op.A_logs") is not None and not any(
        part in key for part in _OTHERS for key in shapes
    )


def configure(shapes: Shapes, hints: Hints) -> VMambaConfig:
    """The configuration that fits `shapes`; with `hints.variant` that one, for the classes and outputs of the file.

    No weight depends on the image size: it is the one that the container names, else 224. Raises CheckpointError.
    """

    def shape(key: str, dimensions: int) -> tuple[int, ...]:
        found = shapes.get(key)
        if found is None or len(found) != dimensions:
            problem = "is missing" if found is None else f"has the shape {found}"
            raise CheckpointError(f"not a VMamba: the weight {key} {problem}")
        return found

    op = "layers.0.blocks.0.op"
    embed_dim = shape("layers.0.blocks.0.norm.weight", 1)[0]
    d_inner = shape(f"{op}.conv2d.weight", 4)[0]
    d_state = shape(f"{op}.A_logs", 2)[1]
    patch = shape("patch_embed.0.weight", 4)[2]
    outs = tuple(stage for stage in range(len(_depths(shapes))) if f"outnorm{stage}.weight" in shapes)
    is_classifier = "classifier.head.weight" in shapes or not outs
    side = hints.image_size or VMambaConfig.image_size[0]
    num_classes = shape("classifier.head.weight", 2)[0] if is_classifier else 0
    crop = hints.eval_crop_ratio or VMambaConfig.eval_crop_ratio
    if hints.variant:
        given = VARIANTS[hints.variant]
        return replace(given, image_size=(side, side), num_classes=num_classes, out_stages=outs, eval_crop_ratio=crop)
    has_mlp = "layers.0.blocks.0.mlp.fc1.weight" in shapes
    return VMambaConfig(
        image_size=(side, side),
        patch_embed="v1" if patch == 4 else "v2",
        downsample="v1" if "layers.0.downsample.reduction.weight" in shapes else "v3",
        embed_dim=embed_dim,
        depths=_depths(shapes),
        num_classes=num_classes,
        d_state=d_state,
        ssm_ratio=d_inner / embed_dim,
        gated=shape(f"{op}.in_proj.weight", 2)[0] == 2 * d_inner,
        conv_bias=f"{op}.conv2d.bias" in shapes,
        mlp_ratio=shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0] / embed_dim if has_mlp else 0.0,
        out_stages=outs,
        eval_crop_ratio=crop,
    )


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's names, and linear weights with two dimensions where the file has them as 1x1 convolutions."""
    names = _names(state)
    if len(names) < len(state):
        twice = sorted(set(state) - set(names.values()))
        raise CheckpointError(f"has these weights under their old and new names: {', '.join(twice[:5])}")
    found = {}
    for name, key in names.items():
        value = state[key]
        one_by_one = _LINEAR.search(name) and value.ndim == 4 and value.shape[2:] == (1, 1)
        found[name] = value.flatten(1) if one_by_one else value
    return found


def resize(state: dict[str, Tensor], config: VMambaConfig, image_size: int) -> tuple[dict[str, Tensor], VMambaConfig]:
    """For images of another size: the weights stay, as none of them depends on the place."""
    return state, replace(config, image_size=(image_size, image_size))


def _names(keys: Shapes | dict[str, Tensor]) -> dict[str, str]:
    """Today's name of every key of a file, to that key. A backbone saved with its detector's prefix loses it."""
    prefix = "backbone." if keys and all(key.startswith("backbone.") for key in keys) else ""
    names = {}
    for key in keys:
        name = key.removeprefix(prefix)
        for pattern, new in _RENAMED:
            name = pattern.sub(new, name)
        names[name] = key
    return names


def _depths(shapes: Shapes) -> tuple[int, ...]:
    """Blocks of each stage. Holes are not looked for: a missing block is a missing weight later."""
    last: dict[int, int] = {}
    for key in shapes:
        if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", key):
            stage, block = int(found[1]), int(found[2])
            last[stage] = max(last.get(stage, 0), block)
    return tuple(last.get(stage, 0) + 1 for stage in range(max(last, default=0) + 1))


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
)
