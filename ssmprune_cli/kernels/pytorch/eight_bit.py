"""Linear layers in eight bits: the truth that csrc/bytes.h is held to.

A token's values become integers of -127 to 127 times a scale of its own, so that the largest is 127; a weight has a
scale for each output. The sum of products of integers is exact, and is scaled once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmprune_cli.kernels.packing import EightBit

MOST = 127
_EXACT = 2**24  # integers up to here are exact in float32


def in_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Integers (..., K), as float32, and scales (..., 1) of tokens x (..., K).

    A token whose scale would be below the normal floats is zero; one that is not finite has a scale that is NaN.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True) / MOST
    small = scale < torch.finfo(torch.float32).tiny
    scale = torch.where(small, torch.zeros_like(scale), scale)
    values = torch.where(small, torch.zeros_like(x), (x * scale.reciprocal()).round().clamp(-MOST, MOST))
    return values, torch.where(scale.isfinite(), scale, torch.full_like(scale, torch.nan))


def eight_bit_linear(x: Tensor, weight: EightBit, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times `weight` (P, K), plus bias (P,), if any: (..., P) in the dtype of x."""
    values, scale = in_eight_bits(x)
    exact = torch.float32 if values.shape[-1] * MOST * MOST < _EXACT else torch.float64
    sums = (values.to(exact) @ weight.values.to(exact).t()).float()
    result = sums * (weight.scale.float() * scale)
    if bias is not None:
        result = result + bias.float()
    return result.to(x.dtype)
