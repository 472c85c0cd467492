"""Linear layers and convolutions with their weights in the order in which the C code reads them."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import unlike
from ssmprune_cli.inference.copying import as_kind, shallow
from ssmprune_cli.kernels import linear, linear_int8, pack_linear, pick
from ssmprune_cli.models import EightBitLinear, channels_last_taps


class PackedLinear(nn.Linear):
    """A linear layer in float32 that takes `kernels.linear` where that is faster."""

    @classmethod
    def of(cls, layer: nn.Linear) -> PackedLinear:
        return as_kind(layer, cls)

    @cached_property
    def packed(self) -> Tensor:
        """The weight as the op takes it, made when it is first needed: in blocks of one call it never is."""
        return pack_linear(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if not pick(x, 1).suits_linear(rows, self.in_features, self.out_features):
            return super().forward(x)
        return linear(x, self.packed, self.bias, self.out_features)


class PackedEightBitLinear(EightBitLinear):
    """One in eight bits whose weight is in the order of the C code."""

    @classmethod
    def of_layer(cls, layer: EightBitLinear) -> PackedEightBitLinear:
        return as_kind(layer, cls)

    @cached_property
    def packed(self) -> Tensor:
        """As `PackedLinear.packed`."""
        return pack_linear(self.eight_bit)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return linear_int8(x.float(), self.packed, bias, self.out_features).to(x.dtype)


def packs(layer: nn.Module) -> bool:
    """Whether `PackedLinear` can take the place of `layer`, and may be faster for many rows."""
    if unlike(layer, nn.Linear) is not None or not isinstance(layer, nn.Linear):
        return False
    many = 1 << 30
    weight = layer.weight
    return weight.dtype == torch.float32 and pick(weight, 1).suits_linear(many, layer.in_features, layer.out_features)


def with_channels_last_taps(layer: nn.Module) -> nn.Module:
    """A copy of a depthwise convolution whose taps of neighbouring channels lie side by side, as the C code reads them.

    Its weight has the same shape (E, 1, ...) and values.
    """
    made = shallow(layer)
    weight = made._parameters["weight"]
    assert weight is not None
    taps = channels_last_taps(weight.detach())  # (E, K) or (E, K, K)
    made._parameters["weight"] = nn.Parameter(taps.unsqueeze(1), requires_grad=False)
    return made
