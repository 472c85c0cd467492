"""A written file is read back and run as its user will, and compared with the model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.export.graph import Answer, parts
from ssmprune_cli.export.target import Run
from ssmprune_cli.models import Backbone

# Of the largest logit. Another runtime may add in another order; half precision has 8 or 11 bits.
_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9}
_HALF_TOLERANCE = 2e-2
# Sums in another order let a value between two integers become the other one, a step of 1/127 of the largest value of
# its token. In a deep model one such step makes others, and of two tokens with scores as high another may be dropped.
# Measured of a trained Vim: up to 8e-3, and 5e-2 where tokens are dropped; eight bits themselves change 1.3e-2 and 0.25
# there. So the answers are not asked to be the same: two classes may be as likely as each other.
_EIGHT_BIT_TOLERANCES = {"all": 2e-2, "dropped": 1e-1}
# Of the answers that have to be the same. Of millions of pixels a few have two classes that are as likely.
AGREEMENTS = {"classification": 1.0, "video-classification": 1.0, "segmentation": 0.999, "detection": 1.0}


@dataclass(frozen=True)
class Check:
    """How a file does in one runtime: `error` is the largest difference of its logits from the model's, as a share of
    the largest one, or of a detector's maps, each by itself; `same` the share of answers that are the model's, and None
    for maps, which are no answers."""

    runtime: str
    batch: int
    error: float
    same: float | None


def agreement_of(model: Backbone) -> float:
    """The least share of answers that have to be the same."""
    return 0.0 if model.eight_bit_kinds else AGREEMENTS[model.task]


def tolerance_of(model: Backbone) -> float:
    """What `error` may be at most."""
    if model.eight_bit_kinds:
        return _EIGHT_BIT_TOLERANCES["all" if model.pruner is None else "dropped"]
    return _TOLERANCES.get(model.dtype, _HALF_TOLERANCE)


def compared(
    model: Callable[[Tensor], Answer], runs: Mapping[str, Run], images: Tensor, sizes: Sequence[int]
) -> tuple[Check, ...]:
    """Each runtime on each size of batch of images (B, 3, H, W)."""
    expected = {size: parts(model(images[:size])) for size in sizes}
    checks = []
    for name, run in runs.items():
        for size, wanted in expected.items():
            found = run(images[:size])
            errors = torch.tensor([_error(*pair) for pair in zip(found, wanted, strict=True)])
            same = same_answers(found[0], wanted[0]) if len(wanted) == 1 else None
            checks.append(Check(name, size, float(errors.max()), same))  # its max is NaN if one is
    return tuple(checks)


def _error(one: Tensor, other: Tensor) -> float:
    """The largest difference as a share of the largest value of `other`."""
    largest = float(other.abs().max()) or 1.0
    return float((one.double() - other.double()).abs().max()) / largest


def same_answers(one: Tensor, other: Tensor) -> float:
    """The share of logits (B, classes, ...) that have their largest at the same class."""
    return float((one.argmax(dim=1) == other.argmax(dim=1)).double().mean())


def recorded(checks: Sequence[Check], images: str, tolerance: float | None) -> str:
    """What a file says of its own check: its fact of this name."""
    return json.dumps({"images": images, "tolerance": tolerance, "runs": [asdict(check) for check in checks]})


def judge(checks: Sequence[Check], target: str, path: Path, tolerance: float, agreement: float) -> None:
    """SsmpruneError for the first check that fails."""
    for check in checks:
        where = f"in {check.runtime}, with {check.batch} images in a batch,"
        if not check.error <= tolerance:
            raise SsmpruneError(
                f"the {target} file computes something else: {where} its outputs are {check.error:.2g} of the largest "
                f"one away from the model's, and {tolerance:g} is allowed",
                where=str(path),
            )
        if check.same is not None and not check.same >= agreement:
            raise SsmpruneError(
                f"the {target} file computes something else: {where} {check.same:.2%} of its answers are the model's",
                where=str(path),
            )
