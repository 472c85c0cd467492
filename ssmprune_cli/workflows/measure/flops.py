"""Multiply-adds of a model, traced by fvcore with handlers for our own ops.

Convention: one multiply-add counts as one, as in fvcore and the papers. `directions: all` counts every scan direction.
`directions: one` counts what the directions of a mixer repeat (the scan and `Mixer.per_direction`) once, as the Vim
literature does (Vim-T 1.45 G, Vim-S 5.08 G). A scan counts 9 B L E N, and B L E each for D, a gate inside it and
alignment; a token that is never read out (see `frozen`) counts 7 E N there, and no D. Vim's gate is one element-wise
product after both scans, so it is not counted.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.kernels import conv_flops, scan_flops
from ssmprune_cli.models import Backbone

# What fvcore and the papers do not count: element-wise arithmetic, norms built from it, reshaping, sorting, gathering.
_FREE = (
    "abs add add_ all amin any arange argmax argmin argsort bitwise_and bitwise_not bitwise_or bitwise_xor "
    "broadcast_tensors cat clamp clamp_ clamp_min clone constant_pad_nd contiguous cos cosine_similarity cumsum "
    "detach diff div div_ empty_like eq exp expand expand_as fill_ flatten flip floor_divide full gather ge gelu gt "
    "index index_select le linalg_vector_norm lt masked_fill max maximum mean min movedim mul mul_ nan_to_num ne "
    "neg new_ones new_zeros norm ones ones_like pad permute pow reciprocal relu remainder repeat reshape rsqrt rsub "
    "scatter scatter_add searchsorted select sigmoid silu sin slice softplus sort split split_with_sizes sqrt "
    "square squeeze stack std sub sum t tanh tile to transpose type_as unbind unflatten unsqueeze view view_as "
    "where zeros zeros_like __and__ __lshift__ __or__ __rshift__ __xor__"
)
_FREE_OPS = frozenset(f"aten::{name}" for name in _FREE.split()) | {"ssmprune::add_rms_norm", "ssmprune::gated_sum"}


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds for one image. `per_block` has one entry a block, all directions counted."""

    all_directions: int
    one_direction: int
    per_block: tuple[int, ...]


def _shape(value: Any) -> list[int]:
    """Sizes of a traced tensor; empty for an absent one."""
    return list(value.type().sizes()) if value.isCompleteTensor() else []


def _scan_handler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus", "shift", "gap")
    read = _shape(inputs[13])
    shapes = {name: _shape(value) for name, value in zip(names, inputs, strict=False)}
    batch, length, channels = shapes["u"]
    flops = scan_flops(
        batch,
        length,
        channels,
        shapes["A"][1],
        has_D=bool(shapes["D"]),
        has_z=bool(shapes["z"]),
        read=read[1] if read else None,
    )
    if shapes["shift"] or shapes["gap"]:
        flops += batch * length * channels  # delta + gap * gap_delta
    return Counter({"selective_scan": flops})


def _conv_handler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    batch, length, channels = _shape(inputs[0])
    return Counter({"causal_conv1d": conv_flops(batch, length, channels, _shape(inputs[1])[1])})


def _sparse_conv_handler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    batch, length, channels = _shape(inputs[0])
    return Counter({"causal_conv1d": conv_flops(batch, length, channels, _shape(inputs[3])[1])})


def _grid_conv_handler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    batch, length, channels = _shape(outputs[0])
    return Counter({"grid_conv2d": conv_flops(batch, length, channels, _shape(inputs[1])[1] ** 2)})


def _addcmul_handler(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter({"selective_scan": math.prod(_shape(outputs[0]))})  # the skip of pooled tokens


def count_flops(model: Backbone) -> FlopCount:
    """Count the multiply-adds of one image through `model`, its pruner included.

    Raises SsmpruneError naming every op that is neither counted nor known to be free: never a silent zero.
    """
    images = torch.zeros(1, 3, *model.image_size, device=next(model.parameters()).device, dtype=model.dtype)
    analysis = FlopCountAnalysis(model, images)
    analysis.set_op_handle("ssmprune::selective_scan", _scan_handler)
    analysis.set_op_handle("ssmprune::causal_conv1d", _conv_handler)
    analysis.set_op_handle("ssmprune::sparse_conv1d", _sparse_conv_handler)
    analysis.set_op_handle("ssmprune::grid_conv2d", _grid_conv_handler)
    analysis.set_op_handle("aten::addcmul", _addcmul_handler)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # a batch norm in training would take up the zeros
    with torch.no_grad():
        total = int(analysis.total())
    for module, mode in modes.items():
        module.training = mode
    unknown = sorted(set(analysis.unsupported_ops()) - _FREE_OPS)
    if unknown:
        raise SsmpruneError(
            f"multiply-adds of these ops are not known: {', '.join(unknown)}",
            hint="Please report this: a count that leaves them out would be wrong.",
        )
    names = {id(module): name for name, module in model.named_modules()}
    mixer_names = [names[id(mixer)] for mixer in model.mixers]
    by_module, by_operator = analysis.by_module(), analysis.by_module_and_operator()
    repeated = 0.0
    for mixer, name in zip(model.mixers, mixer_names, strict=True):
        own = by_operator[name]["selective_scan"] + sum(by_module[f"{name}.{child}"] for child in mixer.per_direction)
        repeated += own * (1 - 1 / mixer.directions)
    blocks = (names[id(block)] for block in model.blocks)
    return FlopCount(total, total - round(repeated), tuple(int(by_module[block]) for block in blocks))
