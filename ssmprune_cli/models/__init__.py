"""Model families by name, and the same weights for other images. A family registers here in one line; see `Family`."""

from __future__ import annotations

from ssmprune_cli.models.common import (
    FAMILIES,
    MAX_SIDE,
    SMALL_SIDE,
    Backbone,
    Block,
    ChannelGate,
    EightBitLinear,
    Family,
    Hints,
    ImageConfig,
    Inflow,
    Places,
    RMSNorm,
    Shapes,
    Visits,
    channels_last_taps,
    decay_rates,
    inflow,
    make_room_for_eight_bits,
    put_in_eight_bits,
    set_drop_path,
    set_layer,
    set_recompute,
)
from ssmprune_cli.models.cutting import MAX_CUT, blocks_cut, cut_short, cuts
from ssmprune_cli.models.dense import (
    PLAINMAMBA_MASK_RCNN,
    PLAINMAMBA_UPERNET,
    VMAMBA_MASK_RCNN,
    VMAMBA_UPERNET,
    DenseConfig,
    DenseModel,
    Detector,
    Segmenter,
)
from ssmprune_cli.models.efficientvmamba import EFFICIENTVMAMBA, AtrousMixer
from ssmprune_cli.models.heads import Detections
from ssmprune_cli.models.language import (
    MAMBA1,
    MAMBA2,
    MAX_LENGTH,
    LanguageModel,
    Mamba2Mixer,
    Prefilled,
    generate,
    prefill,
    step,
)
from ssmprune_cli.models.localvmamba import LOCALVMAMBA, LocalVMambaMixer, RouteProjections
from ssmprune_cli.models.mamba import (
    DIRECTION,
    LOCALVIM,
    MAMBA_REG,
    VIDEOMAMBA,
    VIDEOMAMBA_CLIPS,
    VIM,
    BranchMixer,
    CausalConv1d,
    LocalMixer,
    MambaBackbone,
    MambaBlock,
    MambaConfig,
    MambaMixer,
    MambaSequence,
    StepProjection,
    conv_sources,
    scan_path,
    unit_tokens,
)
from ssmprune_cli.models.mambavision import MAMBAVISION, AttentionMixer, CentredMixer
from ssmprune_cli.models.medmamba import MEDMAMBA
from ssmprune_cli.models.plainmamba import PLAINMAMBA, PlainMambaMixer, walks
from ssmprune_cli.models.plugins import add_plugins
from ssmprune_cli.models.resizing import before_resizing, resize, sides
from ssmprune_cli.models.smaller import WHOLE, Size, blocks_left_out, dense_config, size_of, smaller
from ssmprune_cli.models.vmamba import VMAMBA, DirectionProjections, VMambaMixer, column_gaps

FAMILIES.register("vim", VIM)
FAMILIES.register("videomamba", VIDEOMAMBA)
FAMILIES.register("videomamba-clips", VIDEOMAMBA_CLIPS)
FAMILIES.register("mambar", MAMBA_REG)
FAMILIES.register("localvim", LOCALVIM)
FAMILIES.register("plainmamba", PLAINMAMBA)
FAMILIES.register("vmamba", VMAMBA)
FAMILIES.register("localvmamba", LOCALVMAMBA)
FAMILIES.register("medmamba", MEDMAMBA)
FAMILIES.register("efficientvmamba", EFFICIENTVMAMBA)
FAMILIES.register("mambavision", MAMBAVISION)
FAMILIES.register("mamba", MAMBA1)
FAMILIES.register("mamba2", MAMBA2)
FAMILIES.register("vmamba-upernet", VMAMBA_UPERNET)
FAMILIES.register("plainmamba-upernet", PLAINMAMBA_UPERNET)
FAMILIES.register("vmamba-maskrcnn", VMAMBA_MASK_RCNN)
FAMILIES.register("plainmamba-maskrcnn", PLAINMAMBA_MASK_RCNN)
FAMILIES.when_read(add_plugins)

__all__ = [
    "DIRECTION",
    "FAMILIES",
    "MAX_CUT",
    "MAX_LENGTH",
    "MAX_SIDE",
    "SMALL_SIDE",
    "WHOLE",
    "AtrousMixer",
    "AttentionMixer",
    "Backbone",
    "Block",
    "BranchMixer",
    "CausalConv1d",
    "CentredMixer",
    "ChannelGate",
    "DenseConfig",
    "DenseModel",
    "Detections",
    "Detector",
    "DirectionProjections",
    "EightBitLinear",
    "Family",
    "Hints",
    "ImageConfig",
    "Inflow",
    "LanguageModel",
    "LocalMixer",
    "LocalVMambaMixer",
    "Mamba2Mixer",
    "MambaBackbone",
    "MambaBlock",
    "MambaConfig",
    "MambaMixer",
    "MambaSequence",
    "Places",
    "PlainMambaMixer",
    "Prefilled",
    "RMSNorm",
    "RouteProjections",
    "Segmenter",
    "Shapes",
    "Size",
    "StepProjection",
    "VMambaMixer",
    "Visits",
    "before_resizing",
    "blocks_cut",
    "blocks_left_out",
    "channels_last_taps",
    "column_gaps",
    "conv_sources",
    "cut_short",
    "cuts",
    "decay_rates",
    "dense_config",
    "generate",
    "inflow",
    "make_room_for_eight_bits",
    "prefill",
    "put_in_eight_bits",
    "resize",
    "scan_path",
    "set_drop_path",
    "set_layer",
    "set_recompute",
    "sides",
    "size_of",
    "smaller",
    "step",
    "unit_tokens",
    "walks",
]
