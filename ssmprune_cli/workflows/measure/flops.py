"""Multiply-adds of a model, counted while it runs, with torch's formulas and those of our own ops (kernels/ops).

Convention: one multiply-add counts as one, as in fvcore and the papers; torch's FlopCounterMode gives twice the number.
`directions: all` counts every scan direction. `directions: one` counts what the directions of a mixer repeat (the scan
and `Mixer.per_direction`) once, as the Vim literature does (Vim-T 1.45 G, Vim-S 5.08 G). A scan counts 9 B L E N, and
B L E each for D, a gate inside it and alignment; a token that is never read out (see `frozen`) counts 7 E N there, and
no D. Element-wise arithmetic outside of an op is free, and so are interpolations and norms, whether PyTorch has an op
for them or not: Vim's gate is a product after both scans, and so is D of pooled tokens.

fvcore counts the same by torch.jit.trace, in twice the time or more; tests compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.interface import Mixer
from ssmprune_cli.models import Backbone, DenseModel
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name

# What fvcore and the papers do not count, beside views and element-wise arithmetic, which PyTorch has tags for: norms,
# pooling and interpolations; sums, extremes and order; lookup; new tensors and copies.
_FREE = (
    "_adaptive_avg_pool2d _native_batch_norm_legit_no_training add_rms_norm avg_pool2d cudnn_batch_norm "
    "grid_sampler_2d linalg_vector_norm max_pool2d_with_indices native_batch_norm native_group_norm native_layer_norm "
    "norm upsample_bicubic2d upsample_bilinear2d upsample_nearest2d "
    "_log_softmax _softmax all amax amin any argmax argmin cumsum floor_divide gated_sum logsumexp max mean min prod "
    "order_tokens rsub score_tokens sort std std_mean sum topk var var_mean "
    "bucketize embedding gather index index_add index_copy index_fill index_put index_select isin masked_fill "
    "move_tokens nonzero repeat_interleave scatter scatter_add scatter_reduce searchsorted "
    "_local_scalar_dense _to_copy _unsafe_view arange bernoulli cat constant_pad_nd copy empty empty_like "
    "empty_strided eye fill flip full full_like new_empty new_full new_ones new_zeros normal ones ones_like rand randn "
    "randperm reflection_pad2d repeat replication_pad2d roll scalar_tensor stack tril triu uniform zero zeros "
    "zeros_like"
)
_FREE_OPS = frozenset(_FREE.split())


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


@cache
def _is_free(func: Any) -> bool:
    tagged = torch.Tag.pointwise in func.tags or torch.Tag.inplace_view in func.tags
    return func.is_view or tagged or op_name(func).rstrip("_") in _FREE_OPS


@dataclass
class _Work:
    """Multiply-adds; `scans` are those of `total` that scans do."""

    total: int = 0
    scans: int = 0


class _Counter(EveryOp):
    """Adds up multiply-adds, of all that runs and of what runs inside the modules that it watches.

    unknown  ops that are neither counted nor known to be free
    """

    def __init__(self) -> None:
        super().__init__()
        self.all = _Work()
        self.by_module: dict[nn.Module, _Work] = {}
        self.unknown: set[str] = set()
        self._inside: list[nn.Module] = []

    def around(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        formula: Callable[..., int] | None = flop_registry.get(func.overloadpacket)
        if formula is None and not _is_free(func):
            with self:  # an op made of others, which PyTorch passes on whole in its inference mode
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            self.unknown.add(str(func.name()))
        result = func(*args, **kwargs)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=result) // 2  # torch counts a multiply-add as two
            scans = flops if op_name(func) == "selective_scan" else 0
            for work in (self.all, *(self.by_module[module] for module in set(self._inside))):
                work.total += flops
                work.scans += scans
        return result

    @contextmanager
    def watching(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Tell what runs inside of each of `modules`."""

        def enter(module: nn.Module, _: Any) -> None:
            self._inside.append(module)

        def leave(*_: Any) -> None:
            self._inside.pop()

        self.by_module = {module: _Work() for module in modules}
        handles = [module.register_forward_pre_hook(enter, prepend=True) for module in self.by_module]
        handles += [module.register_forward_hook(leave) for module in self.by_module]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def count_flops(model: Backbone, images: Tensor | None = None) -> FlopCount:
    """Count the multiply-adds of one image, or one window of text, through `model`, its pruner included: of its own
    size, or of `images` (one of them).

    Raises SsmpruneError naming every op that is neither counted nor known to be free: never a silent zero.
    """
    images = model.example(1) if images is None else images
    mixers = [(mixer, _module(mixer)) for mixer in model.mixers]
    per_direction = [[module.get_submodule(name) for name in mixer.per_direction] for mixer, module in mixers]
    head = model.head if isinstance(model, DenseModel) else None
    counter = _Counter()
    modes = {module: module.training for module in model.modules()}
    model.eval()  # a batch norm in training would take up the zeros
    watched = [*model.blocks, *(module for _, module in mixers), *chain(*per_direction)]
    try:
        with torch.no_grad(), counter.watching(watched if head is None else [*watched, head]), counter:
            model(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if counter.unknown:
        raise SsmpruneError(
            f"multiply-adds of these ops are not known: {', '.join(sorted(counter.unknown))}",
            hint="A count without them would be wrong. workflows/measure/flops.py names the free ones; or report this.",
        )
    work, repeated = counter.by_module, 0.0
    for (mixer, module), parts in zip(mixers, per_direction, strict=True):
        own = work[module].scans + sum(work[part].total for part in parts)
        repeated += own * (1 - 1 / mixer.directions)
    total = counter.all.total
    per_block = tuple(work[block].total for block in model.blocks)
    return FlopCount(total, total - round(repeated), per_block, 0 if head is None else work[head].total)


def _module(mixer: Mixer) -> nn.Module:
    assert isinstance(mixer, nn.Module)
    return mixer
