"""Peak memory of a forward pass, or of a training step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ssmprune_cli.inference import Session
from ssmprune_cli.workflows.measure.every_op import EveryOp


class _LiveTensors(EveryOp):
    """Adds up the storages that are alive, op by op; what an op allocates and frees inside itself is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._seen: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.current -= size

    def around(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result


def peak_memory(session: Session, images: Tensor) -> int:
    """Bytes of the largest set of tensors alive at once in a forward pass, what the session holds and input included.

    On a CPU the ops that fused ones are made of stand for what those hold inside.
    """

    def forward() -> None:
        with torch.no_grad():
            session.definition(images) if images.device.type == "cpu" else session(images)

    return peak_memory_of(forward, [*session.tensors(), images])


def peak_memory_of(work: Callable[[], None], tensors: Sequence[Tensor]) -> int:
    """Bytes of the largest set of tensors alive at once in `work`, those that it starts with (`tensors`) included.

    On a GPU it is the CUDA allocator's peak; on a CPU it is added up from the tensors that ops return.
    """
    device = tensors[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    tracker = _LiveTensors()
    for tensor in tensors:
        tracker.add(tensor)
    with tracker:
        work()
    return tracker.peak
