"""The least time in which this machine could run a model: a roofline of its arithmetic and its bytes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ssmprune_cli.inference import Session
from ssmprune_cli.workflows.measure.breakdown import MATRIX_PRODUCTS
from ssmprune_cli.workflows.measure.every_op import EveryOp, op_name

FUSED = ("mamba_inner", "mamba_blocks", "routed_scans")
_COPY_BYTES = 2**26  # copied to measure bandwidth: more than caches hold
_COPIES = 5


@dataclass(frozen=True)
class Floor:
    """Milliseconds of a batch.

    multiply_adds_ms  every matrix product and scan of the model, each alone or inside of fused ops, whichever takes
                      less, at the best of several runs
    bytes_ms          reading what they read, weights included, and writing what they write, as fast as a copy
    """

    multiply_adds_ms: float
    bytes_ms: float

    @property
    def total_ms(self) -> float:
        """The larger of the two, as they can overlap."""
        return max(self.multiply_adds_ms, self.bytes_ms)

    def to_dict(self) -> dict[str, float]:
        return {**asdict(self), "total_ms": self.total_ms}


class Arithmetic(EveryOp):
    """Collects the matrix products and scans of what runs inside, alone or in fused ops.

    calls, counts  one call of each kind and shape, and how many there are
    bytes          that all of them read and write
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Callable[[], Any]] = {}
        self.counts: Counter[str] = Counter()
        self.bytes = 0

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        name = op_name(func)
        if name in MATRIX_PRODUCTS or name in ("selective_scan", "ssd_scan", *FUSED):
            layout = tree_map_only(Tensor, lambda each: (tuple(each.shape), each.stride(), each.dtype), args)
            key = f"{name} {layout}"
            self.counts[key] += 1
            tensors = [each for each in tree_leaves((args, result)) if isinstance(each, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            self.calls.setdefault(key, lambda: func(*args, **kwargs))
        return result


def floor(session: Session, images: Tensor, rounds: int = 5) -> Floor:
    """The floor of a forward pass of a session's model on `images` (B, 3, H, W)."""
    with torch.inference_mode():
        with Arithmetic() as found:
            session.definition(images)
        with Arithmetic() as joined:  # what is done in one op does not leave the caches in between
            session.observed(images)
        # of a small model the calls of single ops take longer than a fused op in all
        seconds = min(_least_of_all(each, images, rounds) for each in (found, joined))
    return Floor(1e3 * seconds, 1e3 * _seconds_a_byte(images.device) * joined.bytes)


@cache
def _seconds_a_byte(device: torch.device) -> float:
    """Of reading or writing it, in a copy that no cache holds: it tells of the machine alone."""
    source = torch.zeros(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return _least(lambda: target.copy_(source), source, _COPIES) / (2 * _COPY_BYTES)


def _least_of_all(found: Arithmetic, images: Tensor, rounds: int) -> float:
    return sum(found.counts[key] * _least(call, images, rounds) for key, call in found.calls.items())


def _least(call: Callable[[], Any], images: Tensor, rounds: int) -> float:
    """Seconds of the fastest of `rounds` calls: what else the machine does only ever adds to the least time."""
    times = []
    for number in range(rounds + 1):  # the first one warms up
        start = time.perf_counter()
        call()
        if images.is_cuda:
            torch.cuda.synchronize(images.device)
        if number:
            times.append(time.perf_counter() - start)
    return min(times)
