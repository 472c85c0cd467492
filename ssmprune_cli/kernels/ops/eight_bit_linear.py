"""The public op `eight_bit_linear`: a linear layer in eight bits as a model has it, with its weight in plain rows. See
pytorch/eight_bit.py for what it computes; sessions compute the same by `linear_int8`, of packed weights.

One op, and not the dozen that it is made of: an exported file has one node for it, and autocast does not reach into it,
for in half precision sums of integers would not be exact.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import pytorch
from ssmprune_cli.kernels.ops.library import counted, define, tracing
from ssmprune_cli.kernels.packing import EightBit


def eight_bit_linear(x: Tensor, weight: EightBit, bias: Tensor | None = None) -> Tensor:
    """x (..., K) times `weight` (P, K), plus bias (P,), if any: (..., P) in the dtype of x.

    For inference: it has no gradient. Raises KernelError for what does not fit.
    """
    result: Tensor = torch.ops.ssmprune.eight_bit_linear(x, weight.values, weight.scale, bias)
    return result


def _check(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    if tracing():
        return
    outputs, inputs = values.shape
    if values.dtype != torch.int8:
        raise KernelError(f"values must be {torch.int8}, not {values.dtype}")
    if x.shape[-1] != inputs:
        raise KernelError(f"x has {x.shape[-1]} channels, and the weight takes {inputs}")
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != (outputs,):
            raise KernelError(f"{name} has shape {tuple(tensor.shape)}, not {(outputs,)}")


def _linear(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, scale, bias)
    return pytorch.eight_bit_linear(x, EightBit(values, scale), bias)


def _fake(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, scale, bias)
    return x.new_empty(*x.shape[:-1], values.shape[0])


define("eight_bit_linear", _linear, _fake)


@counted("eight_bit_linear")
def _(x: Any, values: Any, *_: Any, **__: Any) -> int:
    return int(math.prod(x) * values[0])
