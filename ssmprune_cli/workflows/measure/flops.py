"""Multiply-adds of a model, traced by fvcore with the formulas of our own ops (kernels/ops).

Convention: one multiply-add counts as one, as in fvcore and the papers; torch's FlopCounterMode gives twice the number.
`directions: all` counts every scan direction. `directions: one` counts what the directions of a mixer repeat (the scan
and `Mixer.per_direction`) once, as the Vim literature does (Vim-T 1.45 G, Vim-S 5.08 G). A scan counts 9 B L E N, and
B L E each for D, a gate inside it and alignment; a token that is never read out (see `frozen`) counts 7 E N there, and
no D. Element-wise arithmetic outside of an op is free, and so are interpolations and norms, whether PyTorch has an op
for them or not: Vim's gate is a product after both scans, and so is D of pooled tokens.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.kernels import FORMULAS
from ssmprune_cli.models import Backbone, DenseModel

# What fvcore and the papers do not count: element-wise arithmetic, norms built from it, reshaping, sorting, gathering.
_FREE = (
    "abs adaptive_avg_pool2d add add_ addcmul all amax amin any arange argmax argmin argsort avg_pool2d batch_norm "
    "bitwise_and bitwise_not bitwise_or bitwise_xor broadcast_tensors cat clamp clamp_ clamp_min clone "
    "constant_pad_nd contiguous cos cosine_similarity cumsum detach diff div div_ empty_like eq exp expand expand_as "
    "fill_ flatten flip floor_divide full gather ge gelu grid_sampler gt index index_select isfinite layer_norm le "
    "lerp linalg_vector_norm lt masked_fill max max_pool2d maximum mean min movedim mul mul_ nan_to_num ne neg "
    "new_ones new_zeros norm ones ones_like pad permute pow reciprocal relu remainder repeat reshape round rsqrt "
    "rsub scatter scatter_add searchsorted select sigmoid silu sin slice softmax softplus sort split "
    "split_with_sizes sqrt square squeeze stack std sub sum t tanh tile to transpose type_as unbind unflatten "
    "unsqueeze upsample_bicubic2d upsample_bilinear2d upsample_nearest2d view view_as where zeros zeros_like __and__ "
    "__lshift__ __or__ __rshift__ __xor__ embedding repeat_interleave"
)
_FREE_OPS = frozenset(f"aten::{name}" for name in _FREE.split()) | {"ssmprune::add_rms_norm", "ssmprune::gated_sum"}


@dataclass(frozen=True)
class FlopCount:
    """Multiply-adds for one image. `per_block` has one entry a block, all directions counted.

    head  of all, those of a dense model's head, which no pruning changes; the rest are its encoder's
    """

    all_directions: int
    one_direction: int
    per_block: tuple[int, ...]
    head: int = 0

    @property
    def encoder(self) -> int:
        """Those of the backbone, all directions counted; a classifier's last layer is in it."""
        return self.all_directions - self.head


def _size(value: Any) -> Any:
    """A traced argument as a formula takes it: sizes in the place of a tensor, None for what is not there."""
    return list(value.type().sizes()) if value.isCompleteTensor() else value.toIValue()


def _handler(name: str) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """For fvcore: the formula that the op itself has."""

    def count(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        flops = FORMULAS[name](*map(_size, inputs), out_shape=_size(outputs[0]))
        return Counter({name.removeprefix("ssmprune::"): flops})

    return count


def _nothing(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
    return Counter()


def count_flops(model: Backbone, images: Tensor | None = None) -> FlopCount:
    """Count the multiply-adds of one image, or one window of text, through `model`, its pruner included: of its own
    size, or of `images` (one of them).

    Raises SsmpruneError naming every op that is neither counted nor known to be free: never a silent zero.
    """
    images = model.example(1) if images is None else images
    analysis = FlopCountAnalysis(model, images)
    for name in FORMULAS:
        analysis.set_op_handle(name, _handler(name))
    for name in _FREE_OPS:  # fvcore itself counts norms that are one op, pooling and interpolations
        analysis.set_op_handle(name, _nothing)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    modes = {module: module.training for module in model.modules()}
    model.eval()  # a batch norm in training would take up the zeros
    with torch.no_grad():
        total = int(analysis.total())
    for module, mode in modes.items():
        module.training = mode
    unknown = sorted(analysis.unsupported_ops())
    if unknown:
        raise SsmpruneError(
            f"multiply-adds of these ops are not known: {', '.join(unknown)}",
            hint="A count without them would be wrong. workflows/measure/flops.py names the free ones; or report this.",
        )
    names = {id(module): name for name, module in model.named_modules()}
    mixer_names = [names[id(mixer)] for mixer in model.mixers]
    by_module, by_operator = analysis.by_module(), analysis.by_module_and_operator()
    repeated = 0.0
    for mixer, name in zip(model.mixers, mixer_names, strict=True):
        own = by_operator[name]["selective_scan"] + sum(by_module[f"{name}.{child}"] for child in mixer.per_direction)
        repeated += own * (1 - 1 / mixer.directions)
    blocks = (names[id(block)] for block in model.blocks)
    head = int(by_module["head"]) if isinstance(model, DenseModel) else 0
    return FlopCount(total, total - round(repeated), tuple(int(by_module[block]) for block in blocks), head)
