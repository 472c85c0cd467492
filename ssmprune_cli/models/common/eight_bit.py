"""Linear layers in eight bits: weights with a scale for each output, tokens with one of their own while they run.

Symmetric, to the nearest integer of -127 to 127. See kernels/pytorch/eight_bit.py for the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.kernels import EightBit, eight_bit_linear, in_eight_bits


class EightBitLinear(nn.Module):
    """Stands for a linear layer. For inference: its weight gets no gradient.

    values  (outputs, inputs) int8
    scale   (outputs,) float32: output p's weight is values[p] * scale[p]
    bias    (outputs,) or None
    """

    values: Tensor
    scale: Tensor

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("values", torch.zeros(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.zeros(out_features))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features)) if bias else None)

    @classmethod
    def of(cls, layer: nn.Linear) -> EightBitLinear:
        """`layer`, rounded. Raises UsageError if a weight is not finite."""
        weight = layer.weight.detach()
        if not weight.isfinite().all():
            raise UsageError("a weight that is not finite cannot be put into eight bits")
        own = cls(layer.in_features, layer.out_features, bias=layer.bias is not None).to(weight.device)
        integers, scale = in_eight_bits(weight)
        own.values.copy_(integers.to(torch.int8))
        own.scale.copy_(scale[:, 0])
        if layer.bias is not None:
            own.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
        return own.train(layer.training)

    @property
    def eight_bit(self) -> EightBit:
        return EightBit(self.values, self.scale.float())

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) as floats, made whenever it is asked for."""
        return self.values * self.scale[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        return eight_bit_linear(x, self.eight_bit, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


Linear = nn.Linear | EightBitLinear


def first_outputs(layer: Linear, x: Tensor, count: int) -> Tensor:
    """The first `count` outputs of `layer` (..., count)."""
    bias = None if layer.bias is None else layer.bias[:count]
    if isinstance(layer, EightBitLinear):
        return eight_bit_linear(x, EightBit(layer.values[:count], layer.scale[:count].float()), bias)
    return functional.linear(x, layer.weight[:count], bias)


def put_in_eight_bits(model: nn.Module, names: Iterable[str]) -> None:
    """Replace the linear layers called `names` in place. Raises UsageError for a name that is none."""
    for name in names:
        parent, _, own = name.rpartition(".")
        holder = model.get_submodule(parent)
        layer = getattr(holder, own, None)
        if type(layer) is not nn.Linear:
            raise UsageError(f"{name} is a {type(layer).__name__}, not a linear layer")
        setattr(holder, own, EightBitLinear.of(layer))
