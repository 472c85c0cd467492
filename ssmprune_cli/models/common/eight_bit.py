"""Linear layers in eight bits: weights with a scale for each output, tokens with one of their own while they run.

Symmetric, to the nearest integer of -127 to 127. See kernels/pytorch/eight_bit.py for the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError, listing
from ssmprune_cli.kernels import EightBit, eight_bit_linear, in_eight_bits


class EightBitLinear(nn.Module):
    """Stands for a linear layer. For inference: its weight gets no gradient.

    values  (outputs, inputs) int8
    scale   (outputs,) float32, whatever the model is converted to: output p's weight is values[p] * scale[p]
    bias    (outputs,) or None
    """

    values: Tensor
    scale: Tensor
    bias: nn.Parameter | None

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

    def _apply(self, fn: Any, recurse: bool = True) -> EightBitLinear:
        # A conversion, such as to bfloat16, leaves the scale alone: it would shift all weights of an output alike.
        exact = self.scale
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale.dtype != exact.dtype:
            self.scale = exact.to(self.scale.device)
        return self

    @property
    def eight_bit(self) -> EightBit:
        return EightBit(self.values, self.scale)

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


def some_outputs(layer: Linear, x: Tensor, which: slice) -> Tensor:
    """The outputs `which` of `layer` (..., count)."""
    bias = None if layer.bias is None else layer.bias[which]
    if isinstance(layer, EightBitLinear):
        return eight_bit_linear(x, EightBit(layer.values[which], layer.scale[which]), bias)
    return functional.linear(x, layer.weight[which], bias)


# Layers of blocks that are never in eight bits: step sizes go through an exponential, and gates see one row an image.
_STAY = ("dt_proj", "global_reduce", "channel_select")
_DIRECTION = re.compile(r"_(b|\d+)$")  # of a name such as x_proj_b


def linear_kinds(model: nn.Module, blocks: Sequence[nn.Module]) -> dict[str, tuple[str, ...]]:
    """Names, in `model`, of the linear layers in its `blocks` that may be in eight bits, by kind: the last part of the
    name, without that of a direction."""
    inside = {id(layer) for block in blocks for layer in block.modules()}
    kinds: dict[str, list[str]] = {}
    for name, layer in model.named_modules():
        if id(layer) in inside and (type(layer) is nn.Linear or isinstance(layer, EightBitLinear)):
            kind = _DIRECTION.sub("", name.rpartition(".")[2])
            if kind not in _STAY:
                kinds.setdefault(kind, []).append(name)
    return {kind: tuple(names) for kind, names in kinds.items()}


def names_of_kinds(known: dict[str, tuple[str, ...]], kinds: Iterable[str]) -> list[str]:
    """Names of all layers of these kinds. Raises UsageError for a kind that is not among the `known` ones."""
    names: list[str] = []
    for kind in kinds:
        if kind not in known:
            raise UsageError(f"there are no linear layers {kind!r} in the blocks: there are {listing(list(known))}")
        names += known[kind]
    return names


def put_in_eight_bits(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Linear]:
    """Replace the linear layers called `names` in place; returns them. Raises UsageError for a name that is none."""
    before: dict[str, nn.Linear] = {}
    for name in names:
        layer = model.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise UsageError(f"{name} is a {type(layer).__name__}, not a linear layer")
        before[name] = layer
        set_layer(model, name, EightBitLinear.of(layer))
    return before


def make_room_for_eight_bits(model: nn.Module, names: Iterable[str]) -> None:
    """As `put_in_eight_bits`, with no values yet: they are loaded next."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        empty = EightBitLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        set_layer(model, name, empty)


def set_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, layer)


def count_parameters(model: nn.Module) -> int:
    """Numbers in the parameters of `model`, weights in eight bits included."""
    rounded = sum(layer.values.numel() for layer in model.modules() if isinstance(layer, EightBitLinear))
    return rounded + sum(parameter.numel() for parameter in model.parameters())
