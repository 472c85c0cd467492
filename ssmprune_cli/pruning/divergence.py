"""How far a pruned model's answers are from the dense model's, without labels. Of pixels, an image's is their mean."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

Outputs = Tensor | tuple[Tensor, ...]

SOFTNESS = 4.0
_AT_ONCE = 1 << 21  # logits that are compared together: those of an image's pixels are many, and in float64


def divergence(dense: Outputs, pruned: Outputs) -> Tensor:
    """KL(dense || pruned) of the class probabilities in nats, (B,) float64; both are logits (B, classes), or
    (B, classes, H, W): then the mean over the pixels of each image.

    One logit is that of a yes against a no: its probabilities are the sigmoid's. Of feature maps, a tuple of (B, ...),
    which have no probabilities, it is the mean of their `relative_error`.
    """
    if isinstance(dense, tuple):
        return torch.stack([relative_error(*pair) for pair in zip(dense, pruned, strict=True)]).mean(dim=0)
    assert isinstance(pruned, Tensor)
    return _divergence(dense, pruned, 1.0)


def relative_error(dense: Tensor, pruned: Tensor) -> Tensor:
    """(B,) float64: |pruned - dense|^2 / |dense|^2 of each image's values (B, ...); 0 where both are zero."""
    expected, found = (each.double().flatten(1) for each in (dense, pruned))
    error, size = (found - expected).square().sum(dim=1), expected.square().sum(dim=1)
    return torch.where(error > 0, error / size, 0)


def soft_divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """The divergence at the temperature `SOFTNESS`, times its square: a distance of logits, (B,) float64.

    A few images make up most of a mean divergence, so few images order candidates badly by it. Softened, all classes of
    all images have a say, and it tells with fewer images which of two candidates is nearer on unseen ones.
    """
    return SOFTNESS**2 * _divergence(dense, pruned, SOFTNESS)


def _divergence(dense: Tensor, pruned: Tensor, temperature: float) -> Tensor:
    if dense.ndim == 2:
        return _of_rows(dense, pruned, temperature)
    return torch.stack([_of_pixels(*image, temperature) for image in zip(dense, pruned, strict=True)])


def _of_pixels(dense: Tensor, pruned: Tensor, temperature: float) -> Tensor:
    """() of one image (classes, H, W)."""
    pixels = max(1, _AT_ONCE // len(dense))
    parts = zip(dense.flatten(1).split(pixels, dim=1), pruned.flatten(1).split(pixels, dim=1), strict=True)
    sums = [_of_rows(expected.t(), found.t(), temperature).sum() for expected, found in parts]
    return torch.stack(sums).sum() / dense[0].numel()


def _of_rows(dense: Tensor, pruned: Tensor, temperature: float) -> Tensor:
    """(B,) of logits (B, classes)."""
    expected, found = (_two_sided(each.double() / temperature).log_softmax(dim=1) for each in (dense, pruned))
    return (expected.exp() * (expected - found)).sum(dim=1)


def _two_sided(logits: Tensor) -> Tensor:
    """A single logit (B, 1) as two of the same probabilities: the softmax of (x, 0) is the sigmoid of x."""
    return logits if logits.shape[1] > 1 else functional.pad(logits, (0, 1))


def paired(found: Tensor, reference: Tensor) -> tuple[float, float]:
    """Mean of `found` - `reference`, (N,) each of the same images, and its standard error; infinite where they are."""
    difference = found - reference
    if len(difference) < 2 or not bool(difference.isfinite().all()):
        return float(found.mean() - reference.mean()), math.inf
    return float(difference.mean()), float(difference.std()) / math.sqrt(len(difference))


def clearly_less(found: Tensor, reference: Tensor) -> bool:
    """Whether `found` is lower on average than `reference`, (N,) each: a paired one-sided t test at 5 %."""
    mean, error = paired(found, reference)
    # The quantile of Student's t for N - 1 degrees of freedom, to first order in 1 / (N - 1).
    return math.isfinite(error) and mean < -(1.645 + 1.52 / (len(found) - 1)) * error
