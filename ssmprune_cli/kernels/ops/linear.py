"""The public op `linear`: a linear layer in float32, made of products of bfloat16 matrices; for inference.

Processors that have such products do them many times as fast as products in float32, and three values of bfloat16 have
the 24 bits of a float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import LinearInputs
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, refuse_gradients
from ssmprune_cli.kernels.packing import FLOAT_PARTS, tiled_words


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x (..., inputs) times a weight (outputs, inputs), given as `pack_linear` packs it, plus bias (outputs,), if any.

    All in float32. Returns (..., outputs). Has no gradient. Raises KernelError for what does not fit.
    """
    _check(x, weight, bias, outputs)
    refuse_gradients(x, weight, *(() if bias is None else (bias,)))
    result: Tensor = torch.ops.ssmprune.linear(x, weight, bias, outputs)
    return result


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> None:
    if x.dtype != torch.float32:
        raise KernelError(f"x must be {torch.float32}, not {x.dtype}")
    expected: Expected = {"weight": (weight, (tiled_words(outputs, x.shape[-1], FLOAT_PARTS),))}
    if bias is not None:
        expected["bias"] = (bias, (outputs,))
    check(x, {}, expected)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    _check(x, weight, bias, outputs)  # whoever computes it, and also for calls of the op itself
    return pick(x, 1).linear(LinearInputs(x, weight, bias, outputs))


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


define("linear", _linear, _linear_fake)


@counted("linear")
def _(x: Any, weight: Any, bias: Any, outputs: int, *_: Any, **__: Any) -> int:
    return int(math.prod(x) * outputs)
