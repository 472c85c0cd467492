"""Where the time of a forward pass goes, op by op."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.inference import Session
from ssmprune_cli.models import Backbone, DenseModel
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name

PROJECTIONS, CONVOLUTION, SCAN, NORMS, GATHER, ENDS, HEAD, OTHER = (
    "projections",
    "convolution",
    "scan",
    "norms",
    "gather",
    "outside the blocks",
    "head",
    "other",
)
MATRIX_PRODUCTS = frozenset({"addmm", "baddbmm", "bmm", "linear", "mm"})
_KINDS = {
    **dict.fromkeys(MATRIX_PRODUCTS, PROJECTIONS),
    **dict.fromkeys(("causal_conv1d", "sparse_conv1d", "grid_conv2d", "conv1d", "conv2d", "convolution"), CONVOLUTION),
    **dict.fromkeys(("selective_scan", "ssd_scan"), SCAN),
    **dict.fromkeys(
        ("add_rms_norm", "rms_norm", "_fused_rms_norm", "layer_norm", "native_layer_norm", "native_batch_norm"), NORMS
    ),
    **dict.fromkeys(
        ("gather", "index", "index_select", "scatter", "scatter_add", "index_add", "sort", "argsort", "topk"), GATHER
    ),
}


class _Stopwatch(EveryOp):
    """Adds up seconds by part. `place` overrides the kind of an op: the pruner, or outside of all blocks."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.place: list[str | None] = [ENDS]
        self._device = device

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        start = self.now()
        result = func(*args, **kwargs)
        self.seconds[self.place[-1] or _KINDS.get(op_name(func), OTHER)] += self.now() - start
        return result


def time_by_part(session: Session, images: Tensor, total_ms: float, rounds: int = 3) -> dict[str, float]:
    """Milliseconds of a forward pass on `images` (B, 3, H, W) that each part takes; they add up to `total_ms`.

    total_ms  what the pass takes when nobody watches. What the ops of `rounds` watched passes do not account for, such
              as Python between them, is "other"; if they took longer than that, all are scaled. So it is where fused
              ops do the work: the model's definition is watched, op by op.

    A dense model's head is a part of its own, "head", which no pruning changes.
    "gather" is the pruner (scoring, choosing, taking tokens out) and all moving of tokens in blocks, "projections" are
    the matrix products in blocks, "outside the blocks" patch embedding, downsampling and head.
    """
    model = session.definition
    assert isinstance(model, Backbone)
    found: list[defaultdict[str, float]] = []
    with torch.inference_mode():
        for _ in range(rounds):
            watch = _Stopwatch(images.device)
            with _places(model, watch), watch:
                model(images)
            found.append(watch.seconds)
    head = (HEAD,) if isinstance(model, DenseModel) else ()
    parts = (PROJECTIONS, CONVOLUTION, SCAN, NORMS, GATHER, ENDS, *head, OTHER)
    times = {part: 1e3 * statistics.median(seconds[part] for seconds in found) for part in parts}
    watched = sum(times.values())
    if watched > total_ms:
        return {part: value * total_ms / watched for part, value in times.items()}
    return {**times, OTHER: times[OTHER] + total_ms - watched}


@contextmanager
def _places(model: Backbone, watch: _Stopwatch) -> Iterator[None]:
    """Tells `watch` when a block, the pruner or a dense model's head begins and ends."""

    def hook(module: nn.Module, place: str | None) -> list[Any]:
        def enter(*_: Any) -> None:
            watch.place.append(place)

        def leave(*_: Any) -> None:
            watch.place.pop()

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    handles = [handle for block in model.blocks for handle in hook(block, None)]
    if isinstance(model.pruner, nn.Module):
        handles += hook(model.pruner, GATHER)
    if isinstance(model, DenseModel):
        handles += hook(model.head, HEAD)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
