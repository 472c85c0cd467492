"""A written file is read back and run as its user will, and compared with the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.export.target import Run

# Of the largest logit. Another runtime may add in another order; half precision has 8 or 11 bits.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2
# Of the answers that have to be the same. Of millions of pixels a few have two classes that are as likely.
AGREEMENTS = {"classification": 1.0, "segmentation": 0.999}


@dataclass(frozen=True)
class Check:
    """How a file does in one runtime: `error` is the largest difference of its logits from the model's, as a share of
    the largest one; `same` the share of answers that are the model's."""

    runtime: str
    batch: int
    error: float
    same: float


def tolerance_of(dtype: torch.dtype) -> float:
    """What `error` may be at most of a model with such weights."""
    return _TOLERANCES.get(dtype, _HALF_TOLERANCE)


def compared(
    model: Callable[[Tensor], Tensor], runs: Mapping[str, Run], images: Tensor, sizes: Sequence[int]
) -> tuple[Check, ...]:
    """Each runtime on each size of batch of images (B, 3, H, W)."""
    expected = {size: model(images[:size]).double() for size in sizes}
    checks = []
    for name, run in runs.items():
        for size, wanted in expected.items():
            answer = run(images[:size]).double()
            error = float((answer - wanted).abs().max()) / (float(wanted.abs().max()) or 1.0)
            checks.append(Check(name, size, error, same_answers(answer, wanted)))
    return tuple(checks)


def same_answers(one: Tensor, other: Tensor) -> float:
    """The share of logits (B, classes, ...) that have their largest at the same class."""
    return float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean())


def judge(checks: Sequence[Check], target: str, path: Path, tolerance: float, agreement: float) -> None:
    """SsmpruneError for the first check that fails."""
    for check in checks:
        where = f"in {check.runtime}, with {check.batch} images in a batch,"
        if not check.error <= tolerance:
            raise SsmpruneError(
                f"the {target} file computes something else: {where} its logits are {check.error:.2g} of the largest "
                f"one away from the model's, and {tolerance:g} is allowed",
                where=str(path),
            )
        if not check.same >= agreement:
            raise SsmpruneError(
                f"the {target} file computes something else: {where} {check.same:.2%} of its answers are the model's",
                where=str(path),
            )
