"""The public op `linear_int8`: a linear layer whose weight, and whose tokens while it runs, are in eight bits; for
inference. See pytorch/eight_bit.py for what it computes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import LinearInputs
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, refuse_gradients
from ssmprune_cli.kernels.packing import byte_words


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (..., inputs) in float32 times a weight (outputs, inputs), given as `pack_linear` packs an EightBit, plus bias
    (outputs,), if any.

    Returns (..., outputs), float32. Has no gradient. Raises KernelError for what does not fit.
    """
    _check(x, weight, bias, outputs)
    refuse_gradients(x, weight, *(() if bias is None else (bias,)))
    result: Tensor = torch.ops.ssmprune.linear_int8(x, weight, bias, outputs)
    return result


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> None:
    if x.dtype != torch.float32:
        raise KernelError(f"x must be {torch.float32}, not {x.dtype}")
    expected: Expected = {"weight": (weight, (byte_words(outputs, x.shape[-1]),))}
    if bias is not None:
        expected["bias"] = (bias, (outputs,))
    check(x, {}, expected)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    _check(x, weight, bias, outputs)  # also for calls of the op itself
    return pick(x, 1).linear_int8(LinearInputs(x, weight, bias, outputs))


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


define("linear_int8", _linear, _fake)


@counted("linear_int8")
def _(x: Any, weight: Any, bias: Any, outputs: int, *_: Any, **__: Any) -> int:
    return int(math.prod(x) * outputs)
