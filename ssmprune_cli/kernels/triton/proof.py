"""Kernels that no GPU of ours has run: where one is first used it is compared with PyTorch, and left out if it differs.

They are right under Triton's interpreter, and compile for several GPUs. That does not show what a compiler makes of
them on the user's, and a number must not be silently wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result", bound=Tensor | Sequence[Tensor])
Key = tuple[str, torch.device, torch.dtype]

# Of the largest value of a result. Sums are in float32 in both, in another order; results are rounded once.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2**-9, torch.bfloat16: 2**-6}


class Proofs:
    """What has been compared so far in this process, for each kernel, device and dtype."""

    def __init__(self) -> None:
        self._agreed: set[Key] = set()
        self._refused: set[Key] = set()

    def computed(self, kernel: str, like: Tensor, ours: Callable[[], Result], plain: Callable[[], Result]) -> Result:
        """`ours()`, if it was seen to agree with `plain()` for tensors such as `like`; `plain()` if it was not."""
        key = (kernel, like.device, like.dtype)
        if like.device.type != "cuda" or key in self._agreed:  # elsewhere it is the interpreter's
            return ours()
        if key in self._refused or torch.cuda.is_current_stream_capturing():  # a graph cannot wait for a comparison
            return plain()
        with torch.backends.cudnn.flags(allow_tf32=False):  # which would be further off than what is compared
            wanted = plain()
        try:
            found = ours()
            reason = None if _alike(found, wanted) else "its result differs from PyTorch's"
        except Exception as error:  # a compiler of kernels raises many kinds
            reason = (str(error) or type(error).__name__).splitlines()[0]
        if reason is None:
            self._agreed.add(key)
        else:
            self._refused.add(key)
            warnings.warn(
                f"The Triton kernel {kernel} is not used on {like.device} in {like.dtype}: {reason}. "
                "PyTorch computes it. Please report this.",
                RuntimeWarning,
                stacklevel=2,
            )
        return wanted


def _alike(found: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> bool:
    if isinstance(found, Tensor) and isinstance(wanted, Tensor):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return False
        if not found.is_floating_point() or not found.numel():
            return torch.equal(found, wanted)
        finite = wanted.isfinite()
        largest = float(torch.where(finite, wanted, 0).abs().max())
        near = torch.isclose(found, wanted, rtol=0, atol=_TOLERANCE[wanted.dtype] * largest, equal_nan=True)
        return bool(near.all())
    return len(found) == len(wanted) and all(map(_alike, found, wanted))


PROOFS = Proofs()
