"""UperNet on VMamba and PlainMamba: the models of ADE20K that their authors publish, and any other of their kind.

MzeroMiko/VMamba 2ed52ea (segmentation/, mmsegmentation 1.2.2) and ChenhongyiYang/PlainMamba 0975a1d (downstream/
mmsegmentation, 0.23.0). The auxiliary head, which only training uses, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import Backbone, Family, Hints, Shapes, no_stride
from ssmprune_cli.models.dense.checkpoint import encoder_part, part, renamed, resize, whole_images
from ssmprune_cli.models.dense.model import DenseConfig, without_images
from ssmprune_cli.models.dense.segmenter import Segmenter
from ssmprune_cli.models.heads import UperNet, UperNetConfig, configure_upernet
from ssmprune_cli.models.plainmamba import PLAINMAMBA, PlainMamba, PlainMambaConfig, configure_encoder
from ssmprune_cli.models.vmamba import VMAMBA, VMamba, VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio

ADE20K = 512  # pixels of the short side, and what tokens are counted for
# VMamba takes images as they are resized. PlainMamba's authors resize them once more, to sides that 32 divides.
_IMAGES = {"vmamba": KeepRatio(4 * ADE20K, ADE20K), "plainmamba": KeepRatio(4 * ADE20K, ADE20K, divisor=32)}

# What no weight's shape tells, and only one way is computed here.
_COMPUTES = {
    "decode_head": frozenset({"uperhead"}),
    "decode_head.align_corners": frozenset({False}),
    "decode_head.act_cfg": frozenset({"relu"}),
    "decode_head.norm_cfg": frozenset({"syncbn", "bn", "bn2d"}),
    "decode_head.in_index": frozenset(tuple(range(count)) for count in range(1, 9)),  # all maps, in order
    "test_cfg.mode": frozenset({"whole"}),
    "final_norm": frozenset({True}),
    "use_rms_norm": frozenset({False}),
}


def _vmamba_encoders() -> dict[str, VMambaConfig]:
    outputs = {"num_classes": 0, "out_stages": (0, 1, 2, 3), "image_size": (ADE20K, ADE20K)}
    return {name: without_images(replace(each, **outputs)) for name, each in VMAMBA.variants.items()}


def _plainmamba_encoders() -> dict[str, PlainMambaConfig]:
    """Position embeddings are those of classification. The last block's norm is the classifier's."""
    outputs = {"plainmamba_l1": (5, 11, 17, -1), "plainmamba_l2": (5, 11, 17, -1), "plainmamba_l3": (8, 17, 26, -1)}
    size = {"num_classes": 0, "image_size": (ADE20K, ADE20K)}
    return {
        name: without_images(replace(each, out_indices=outputs[name], positions=each.grid, **size))
        for name, each in PLAINMAMBA.variants.items()
    }


_VMAMBAS, _PLAINMAMBAS = _vmamba_encoders(), _plainmamba_encoders()
_TINY, _L1 = _VMAMBAS["vmamba_tiny_s1l8"], _PLAINMAMBAS["plainmamba_l1"]
_TINY_HEAD, _L1_HEAD = (UperNetConfig(in_channels=each.map_channels) for each in (_TINY, _L1))


@dataclass(frozen=True, kw_only=True)
class UperNetModelConfig(DenseConfig):
    """Of a UperNet. Raises UsageError where the head does not fit the encoder's feature maps."""

    head: UperNetConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder.map_channels != self.head.in_channels:
            raise UsageError(
                f"the head takes feature maps of {self.head.in_channels} channels, and the encoder makes them of "
                f"{self.encoder.map_channels}"
            )


@dataclass(frozen=True, kw_only=True)
class VMambaUperNetConfig(UperNetModelConfig):
    """UperNet on a VMamba; by default the smallest that is published."""

    encoder: VMambaConfig = _TINY
    head: UperNetConfig = _TINY_HEAD
    preprocessing: KeepRatio = _IMAGES["vmamba"]


@dataclass(frozen=True, kw_only=True)
class PlainMambaUperNetConfig(UperNetModelConfig):
    """UperNet on a PlainMamba; by default the smallest that is published."""

    encoder: PlainMambaConfig = _L1
    head: UperNetConfig = _L1_HEAD
    preprocessing: KeepRatio = _IMAGES["plainmamba"]


class VMambaUperNet(Segmenter):
    """See VMambaUperNetConfig."""

    family = "vmamba-upernet"

    def __init__(self, config: VMambaUperNetConfig) -> None:
        super().__init__(config, VMamba(config.encoder), UperNet(config.head))


class PlainMambaUperNet(Segmenter):
    """See PlainMambaUperNetConfig."""

    family = "plainmamba-upernet"

    def __init__(self, config: PlainMambaUperNetConfig) -> None:
        super().__init__(config, PlainMamba(config.encoder), UperNet(config.head))


def _family(
    encoder: Family,
    encoders: Mapping[str, Any],
    configure: Callable[[Shapes, Hints], Any],
    config_class: type[UperNetModelConfig],
    build: Callable[[Any], Backbone],
) -> Family:
    """`encoders` are the published ones, by the names of their variants."""
    images = _IMAGES[encoder.name]
    variants = {
        f"upernet_{name}": config_class(
            encoder=each, head=UperNetConfig(in_channels=each.map_channels), preprocessing=images
        )
        for name, each in encoders.items()
    }

    def matches(shapes: Shapes, hints: Hints) -> bool:
        is_upernet = any(f"{head}.psp_modules.0.1.conv.weight" in shapes for head in ("decode_head", "head"))
        return is_upernet and encoder.matches(encoder_part(shapes), Hints())

    def found(shapes: Shapes, hints: Hints) -> UperNetModelConfig:
        no_stride(hints, f"UperNet on {encoder.title}")
        head = configure_upernet(part(shapes, "head."), *_stated(hints))
        if head.num_classes == 1:
            raise CheckpointError("tells one class from the background by a threshold, which is not supported")
        published: KeepRatio | None = images
        if hints.variant:
            given = variants[hints.variant]
            sizes = given.encoder
        else:
            sizes = without_images(configure(part(shapes, "encoder."), Hints(image_size=ADE20K)))
            is_published = head.num_classes == 150 and sizes in [each.encoder for each in variants.values()]
            published = images if is_published else None
        resized = whole_images(hints, published, images)
        sizes = replace(sizes, image_size=(resized.short, resized.short))
        # A data set of another number of classes may stand beside the weights: its names are none of these.
        names = hints.class_names if len(hints.class_names) == head.num_classes else ()
        return config_class(encoder=sizes, head=head, preprocessing=resized, class_names=names)

    return Family(
        name=f"{encoder.name}-upernet",
        title=f"UperNet on {encoder.title}",
        matches=matches,
        configure=found,
        build=build,
        config_class=config_class,
        remap=partial(renamed, encoder=encoder, heads={"decode_head.": "head."}, dropped=("auxiliary_head.",)),
        variants=variants,
        resize=resize,
        fills=lambda config, side: encoder.fills(config.encoder, side),
        computes={**encoder.computes, **_COMPUTES},
        whole_image=True,
    )


def _stated(hints: Hints) -> tuple[tuple[int, ...] | None, float]:
    """Pooling sizes and dropout of the head, as the file says: the first is None where it says nothing."""
    scales = next((each for each in hints.settings.get("decode_head.pool_scales", ()) if isinstance(each, tuple)), None)
    rates = [each for each in hints.settings.get("decode_head.dropout_ratio", ()) if isinstance(each, int | float)]
    return scales, float(rates[0]) if rates else UperNetConfig.dropout


VMAMBA_UPERNET = _family(VMAMBA, _VMAMBAS, VMAMBA.configure, VMambaUperNetConfig, VMambaUperNet)
PLAINMAMBA_UPERNET = _family(PLAINMAMBA, _PLAINMAMBAS, configure_encoder, PlainMambaUperNetConfig, PlainMambaUperNet)
