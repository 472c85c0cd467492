"""Pixels by class: what is counted of an image, and the shares that a set of images comes to.

As mmsegmentation's IoUMetric counts, but in integers. Letters: N images, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmprune_cli.data import NOT_JUDGED
from ssmprune_cli.tasks.bootstrap import resamples

Counts = NDArray[np.int64]
"""(3, C) of one image: pixels of each class that answer and mask agree on, that the mask has, and that the answer has;
only where the mask judges."""
Shares = NDArray[np.float64]


def counted(answer: Tensor, mask: Tensor, classes: int) -> Counts:
    """Of classes (H, W) that a model names, and a mask (H, W) of the same."""
    judged = mask != NOT_JUDGED
    answer, mask = answer[judged], mask[judged]
    parts = (mask[answer == mask], mask, answer)
    found: Counts = torch.stack([part.long().bincount(minlength=classes) for part in parts]).cpu().numpy()
    return found


@dataclass(frozen=True)
class SetShares:
    """Of a set of images, or (R, ...) of several: each class's `iou` and `accuracy` (C,), NaN where it has none, and
    the three figures."""

    iou: Shares
    accuracy: Shares
    miou: Shares
    aacc: Shares
    macc: Shares


def shares(sums: NDArray[np.int64] | Shares) -> SetShares:
    """Of counts (..., 3, C) that are summed up over images."""
    agree, truth, answer = (sums[..., row, :].astype(np.float64) for row in range(3))
    iou, accuracy = _over(agree, truth + answer - agree), _over(agree, truth)
    return SetShares(iou, accuracy, _mean(iou), _over(agree.sum(axis=-1), truth.sum(axis=-1)), _mean(accuracy))


def resampled(models: Sequence[NDArray[np.int64]]) -> list[Shares]:
    """mIoU (R,) of each model, with counts (N, 3, C), on as many images drawn from the N: see `resamples`."""
    images = len(models[0])
    flat = [counts.reshape(images, -1).astype(np.float64) for counts in models]  # (N, 3 C), exact: far below 2^53
    found: list[list[Shares]] = [[] for _ in models]
    for times in resamples(images):
        for own, counts, model in zip(found, flat, models, strict=True):
            own.append(shares((times @ counts).reshape(len(times), *model.shape[1:])).miou)
    return [np.concatenate(own) for own in found]


def _over(part: Shares, whole: Shares) -> Shares:
    """NaN for nothing of nothing."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _mean(values: Shares) -> Shares:
    """Over the classes that have a value; NaN without any."""
    known = ~np.isnan(values)
    return _over(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1).astype(np.float64))
