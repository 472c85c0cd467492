"""Mask R-CNN on VMamba and PlainMamba-Adapter: the models of COCO that their authors publish, and any of their kind.

MzeroMiko/VMamba 2ed52ea (detection/, mmdet 3.3.0), ChenhongyiYang/PlainMamba 0975a1d (downstream/mmdetection, 2.25.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import Backbone, Family, Hints, Shapes, no_stride
from ssmprune_cli.models.dense.checkpoint import encoder_part, part, renamed, resize, whole_images
from ssmprune_cli.models.dense.detector import Detector
from ssmprune_cli.models.dense.model import DenseConfig, without_images
from ssmprune_cli.models.heads import MASK_RCNN_COMPUTES, MaskRCNN, MaskRCNNConfig, configure_mask_rcnn
from ssmprune_cli.models.plainmamba import (
    ADAPTER_COMPUTES,
    PLAINMAMBA,
    AdapterConfig,
    PlainMambaAdapter,
    configure_adapter,
)
from ssmprune_cli.models.vmamba import VMAMBA, VMamba, VMambaConfig
from ssmprune_cli.preprocessing import KeepRatio

COCO = KeepRatio(1333, 800, divisor=32, fill="pad")
_CLASSES = 80
_ASPECT = 1.6  # of the image that tokens are counted for: 800 x 1280 pixels, as the authors count operations
C = TypeVar("C", bound="MaskRCNNModelConfig")
_HEADS = {name: f"head.{name}" for name in ("neck.", "rpn_head.", "roi_head.")}


def counted(images: KeepRatio) -> tuple[int, int]:
    """Height and width that tokens are counted for: of a usual photograph, padded."""
    height, width = (
        math.ceil(side / images.divisor) * images.divisor
        for side in (images.short, min(images.long, round(_ASPECT * images.short)))
    )
    return height, width


def _vmamba_head(channels: tuple[int, ...]) -> MaskRCNNConfig:
    return MaskRCNNConfig(in_channels=channels, num_classes=_CLASSES)


def _plainmamba_head(channels: tuple[int, ...]) -> MaskRCNNConfig:
    return MaskRCNNConfig(
        in_channels=channels, num_classes=_CLASSES, box_convs=4, box_fcs=1, normed=True, original_first=True
    )


def _vmamba_encoders() -> dict[str, VMambaConfig]:
    names = ("vmamba_tiny_s1l8", "vmamba_small_s2l15", "vmamba_base_s2l15")
    outputs = {"num_classes": 0, "out_stages": (0, 1, 2, 3), "image_size": counted(COCO)}
    return {name: without_images(replace(VMAMBA.variants[name], **outputs)) for name in names}


def _plainmamba_encoders() -> dict[str, AdapterConfig]:
    """Position embeddings are those of classification."""
    found = {}
    for name, heads in (("plainmamba_l1", 6), ("plainmamba_l2", 6), ("plainmamba_l3", 8)):
        each = PLAINMAMBA.variants[name]
        adapter = AdapterConfig(
            image_size=counted(COCO),
            embed_dim=each.embed_dim,
            depth=each.depth,
            stem_convs=each.stem_convs,
            dw_layers=each.dw_layers,
            positions=each.grid,
            heads=heads,
            mlp_channels=each.embed_dim // 4,
            runs=tuple(each.depth // 4 * number for number in range(1, 5)),
        )
        found[name] = without_images(adapter)
    return found


_VMAMBA, _PLAINMAMBA = _vmamba_encoders(), _plainmamba_encoders()
_TINY, _L1 = _VMAMBA["vmamba_tiny_s1l8"], _PLAINMAMBA["plainmamba_l1"]
_TINY_HEAD, _L1_HEAD = _vmamba_head(_TINY.map_channels), _plainmamba_head(_L1.map_channels)


@dataclass(frozen=True, kw_only=True)
class MaskRCNNModelConfig(DenseConfig):
    """Of a Mask R-CNN. Raises UsageError where the head does not fit the encoder's feature maps."""

    head: MaskRCNNConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder.map_channels != self.head.in_channels:
            raise UsageError(
                f"the head takes feature maps of {self.head.in_channels} channels, and the encoder makes them of "
                f"{self.encoder.map_channels}"
            )

    @property
    def resized_from(self) -> tuple[int, int] | None:
        return None if self.resized is None else counted(self.resized)

    def with_images(self: C, images: KeepRatio) -> C:
        """The same for images that are brought to the model so; tokens are counted for a usual photograph."""
        return replace(self, encoder=replace(self.encoder, image_size=counted(images)), preprocessing=images)


@dataclass(frozen=True, kw_only=True)
class VMambaMaskRCNNConfig(MaskRCNNModelConfig):
    """Mask R-CNN on a VMamba; by default the smallest that is published."""

    encoder: VMambaConfig = _TINY
    head: MaskRCNNConfig = _TINY_HEAD
    preprocessing: KeepRatio = COCO


@dataclass(frozen=True, kw_only=True)
class PlainMambaMaskRCNNConfig(MaskRCNNModelConfig):
    """Mask R-CNN on a PlainMamba-Adapter; by default the smallest that is published."""

    encoder: AdapterConfig = _L1
    head: MaskRCNNConfig = _L1_HEAD
    preprocessing: KeepRatio = COCO


class VMambaMaskRCNN(Detector):
    """See VMambaMaskRCNNConfig."""

    family = "vmamba-maskrcnn"

    def __init__(self, config: VMambaMaskRCNNConfig) -> None:
        super().__init__(config, VMamba(config.encoder), MaskRCNN(config.head))


class PlainMambaMaskRCNN(Detector):
    """See PlainMambaMaskRCNNConfig."""

    family = "plainmamba-maskrcnn"

    def __init__(self, config: PlainMambaMaskRCNNConfig) -> None:
        super().__init__(config, PlainMambaAdapter(config.encoder), MaskRCNN(config.head))


@dataclass(frozen=True)
class _Kind:
    """What the two families differ in.

    is_encoder      whether these names, as the encoder's own family has them in a file, are of the encoder
    encoders        published ones, by the names of their variants
    head            the published head for an encoder's channels
    original_first  see MaskRCNNConfig; nothing in the weights tells
    """

    family: Family
    title: str
    is_encoder: Callable[[Shapes], bool]
    configure: Callable[[Shapes, Hints], Any]
    encoders: Mapping[str, Any]
    head: Callable[[tuple[int, ...]], MaskRCNNConfig]
    original_first: bool
    config_class: type[MaskRCNNModelConfig]
    build: Callable[[Any], Backbone]
    computes: Mapping[str, frozenset[Any]]


def _family(kind: _Kind) -> Family:
    variants = {
        f"maskrcnn_{name}": kind.config_class(encoder=each, head=kind.head(each.map_channels), preprocessing=COCO)
        for name, each in kind.encoders.items()
    }
    published = [(each.encoder, each.head) for each in variants.values()]

    def matches(shapes: Shapes, hints: Hints) -> bool:
        is_ours = any(f"{place}roi_head.mask_head.conv_logits.weight" in shapes for place in ("", "head."))
        return is_ours and kind.is_encoder(encoder_part(shapes))

    def found(shapes: Shapes, hints: Hints) -> MaskRCNNModelConfig:
        no_stride(hints, kind.title)
        head = configure_mask_rcnn(part(shapes, "head."), original_first=_original_first(hints, kind))
        if hints.variant:
            encoder, usual = variants[hints.variant].encoder, COCO
            known: KeepRatio | None = usual
        else:
            encoder = without_images(kind.configure(part(shapes, "encoder."), replace(hints, image_size=COCO.short)))
            encoder = replace(encoder, image_size=counted(COCO))
            same = replace(head, original_first=kind.original_first)
            known = COCO if (encoder, same) in published else None
        images = whole_images(hints, known, COCO)
        # A data set of another number of classes may stand beside the weights: its names are none of these.
        names = hints.class_names if len(hints.class_names) == head.num_classes else ()
        encoder = replace(encoder, image_size=counted(images))
        return kind.config_class(encoder=encoder, head=head, preprocessing=images, class_names=names)

    return Family(
        name=f"{kind.family.name}-maskrcnn",
        title=kind.title,
        matches=matches,
        configure=found,
        build=kind.build,
        config_class=kind.config_class,
        remap=partial(renamed, encoder=kind.family, heads=_HEADS, dropped=()),
        variants=variants,
        resize=resize,
        fills=lambda config, side: side % config.preprocessing.divisor == 0,
        computes={**kind.family.computes, **MASK_RCNN_COMPUTES, **kind.computes},
        whole_image=True,
    )


def _original_first(hints: Hints, kind: _Kind) -> bool:
    """Whether mmdet 2 made the file, which suppresses boxes in the original image; else as published."""
    for version in hints.settings.get("mmdet_version", ()):
        return str(version).startswith("2.")
    return kind.original_first


def _is_adapter(shapes: Shapes) -> bool:
    return PLAINMAMBA.matches(shapes, Hints()) and any(key.startswith("backbone.interactions.") for key in shapes)


VMAMBA_MASK_RCNN = _family(
    _Kind(
        family=VMAMBA,
        title="Mask R-CNN on VMamba",
        is_encoder=lambda shapes: VMAMBA.matches(shapes, Hints()),
        configure=VMAMBA.configure,
        encoders=_VMAMBA,
        head=_vmamba_head,
        original_first=False,
        config_class=VMambaMaskRCNNConfig,
        build=VMambaMaskRCNN,
        computes={},
    )
)
PLAINMAMBA_MASK_RCNN = _family(
    _Kind(
        family=PLAINMAMBA,
        title="Mask R-CNN on PlainMamba-Adapter",
        is_encoder=_is_adapter,
        configure=configure_adapter,
        encoders=_PLAINMAMBA,
        head=_plainmamba_head,
        original_first=True,
        config_class=PlainMambaMaskRCNNConfig,
        build=PlainMambaMaskRCNN,
        computes=ADAPTER_COMPUTES,
    )
)
