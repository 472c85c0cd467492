"""The two public ops, registered with torch.library: torch.compile, torch.export and FLOP counters see them.

Glossary: B batch, L tokens, E channels, N state size, K convolution width. Layout: channels-last, as GEMMs produce it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import ScanInputs, pick


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = True,
    shift: Tensor | None = None,
    gap: Tensor | None = None,
    gap_delta: Tensor | None = None,
    reverse: bool = False,
) -> Tensor:
    """Mamba-1's selective scan (state-spaces/mamba e9594ce, selective_scan_ref), aligned over pruned tokens.

        dt_t = softplus(delta_t + delta_bias)
        h_t = exp((dt_t + s_t) A) h_{t-1} + dt_t B_t u_t        y_t = (C_t . h_t + D u_t) silu(z_t)

    u, delta, z   (B, L, E)
    A             (E, N), negative: -exp(A_log)
    B, C          (B, L, N)
    D, delta_bias (E,)
    shift         (B, L, E): s, the steps of the pruned tokens just before each token in scan direction
    gap           (B, L): s_t = gap_t * gap_delta with `gap_delta` (E,), or gap_t * dt_t without. Excludes `shift`;
                  no gradient flows to it
    reverse       scan from the last token to the first; outputs stay at their tokens

    Returns y (B, L, E). Raises KernelError for shapes, dtypes or devices that do not fit.
    """
    batch, length, channels = _three(u, "u")
    state = A.shape[-1]
    gap = None if gap is None else gap.to(u)
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, state)),
        "B": (B, (batch, length, state)),
        "C": (C, (batch, length, state)),
        "D": (D, (channels,)),
        "z": (z, (batch, length, channels)),
        "delta_bias": (delta_bias, (channels,)),
        "shift": (shift, (batch, length, channels)),
        "gap": (gap, (batch, length)),
        "gap_delta": (gap_delta, (channels,)),
    }
    _check(u, expected)
    if shift is not None and gap is not None:
        raise KernelError("shift and gap exclude each other")
    if gap_delta is not None and gap is None:
        raise KernelError("gap_delta needs gap")
    result: Tensor = torch.ops.ssmprune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse
    )
    return result


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool = False) -> Tensor:
    """silu(depthwise causal convolution) of tokens x (B, L, E) with weight (E, K) and bias (E,), channels-last.

    `reverse` is the mirror image: flip(conv(flip(x))) along L. Raises KernelError for what does not fit.
    """
    channels = _three(x, "x")[2]
    _check(x, {"weight": (weight, (channels, weight.shape[-1])), "bias": (bias, (channels,))})
    result: Tensor = torch.ops.ssmprune.causal_conv1d(x, weight, bias, reverse)
    return result


def scan_flops(batch: int, length: int, channels: int, state: int, *, has_D: bool, has_z: bool) -> int:
    """Multiply-adds of a scan, 9 B L E N and B L E each for D and the gate (state-spaces/mamba issue 110; VMamba)."""
    return batch * length * channels * (9 * state + has_D + has_z)


def conv_flops(batch: int, length: int, channels: int, width: int) -> int:
    """Multiply-adds of a depthwise convolution."""
    return batch * length * channels * width


def _three(tensor: Tensor, name: str) -> tuple[int, int, int]:
    if tensor.ndim != 3:
        raise KernelError(f"{name} must have shape (batch, tokens, channels), not {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1], tensor.shape[2]


def _check(example: Tensor, expected: dict[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    # While tracing, sizes are tensors, and comparing them would only warn.
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise KernelError(f"{name} has shape {tuple(tensor.shape)}, not {shape}")
        if tensor.dtype != example.dtype:
            raise KernelError(f"{name} is {tensor.dtype}, but the tokens are {example.dtype}")
        if tensor.device != example.device:
            raise KernelError(f"{name} is on {tensor.device}, but the tokens are on {example.device}")


@torch.library.custom_op("ssmprune::selective_scan", mutates_args=())
def _scan_op(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    shift: Tensor | None,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    reverse: bool,
) -> Tensor:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse)
    return pick(u, A.shape[1]).scan(inputs)


@_scan_op.register_fake
def _(u: Tensor, *others: Any) -> Tensor:
    return u.new_empty(u.shape)


@torch.library.custom_op("ssmprune::selective_scan_backward", mutates_args=())
def _scan_backward_op(
    grad: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    shift: Tensor | None,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    reverse: bool,
) -> list[Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse)
    found = pick(u, A.shape[1]).scan_backward(grad, inputs)
    return [gradient.contiguous() for gradient in found if gradient is not None]


@_scan_backward_op.register_fake
def _(grad: Tensor, u: Tensor, *others: Any) -> list[Tensor]:
    delta, A, B, C, D, z, bias, _, shift, _, gap_delta, _ = others
    tensors = (u, delta, A, B, C, D, z, bias, shift, gap_delta)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, softplus, shift, gap, gap_delta, reverse = inputs
    ctx.save_for_backward(*tensors, shift, gap, gap_delta)
    ctx.flags = (softplus, reverse)


def _scan_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, shift, gap, gap_delta = ctx.saved_tensors
    softplus, reverse = ctx.flags
    found = iter(
        torch.ops.ssmprune.selective_scan_backward(
            grad.contiguous(), *tensors, softplus, shift, gap, gap_delta, reverse
        )
    )
    gradients = [None if tensor is None else next(found) for tensor in (*tensors, shift, gap_delta)]
    # In the op's order: eight tensors, the softplus flag, shift, gap, gap_delta, the direction.
    return (*gradients[:8], None, gradients[8], None, gradients[9], None)


_scan_op.register_autograd(_scan_backward, setup_context=_scan_setup)


@torch.library.custom_op("ssmprune::causal_conv1d", mutates_args=())
def _conv_op(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    return pick(x, weight.shape[1]).conv(x, weight, bias, reverse)


@_conv_op.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("ssmprune::causal_conv1d_backward", mutates_args=())
def _conv_backward_op(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> list[Tensor]:
    return [
        gradient.contiguous() for gradient in pick(x, weight.shape[1]).conv_backward(grad, x, weight, bias, reverse)
    ]


@_conv_backward_op.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in (x, weight, bias)]


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _conv_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.ssmprune.causal_conv1d_backward(grad.contiguous(), *ctx.saved_tensors, ctx.reverse)
    return (*found, None)


_conv_op.register_autograd(_conv_backward, setup_context=_conv_setup)


# torch's counter counts a multiply-add as two floating-point operations.
@register_flop_formula(torch.ops.ssmprune.selective_scan)
def _(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, *others: Any, **kwargs: Any) -> int:
    batch, length, channels = u
    return 2 * scan_flops(batch, length, channels, A[1], has_D=D is not None, has_z=z is not None)


@register_flop_formula(torch.ops.ssmprune.causal_conv1d)
def _(x: Any, weight: Any, *others: Any, **kwargs: Any) -> int:
    batch, length, channels = x
    return 2 * conv_flops(batch, length, channels, weight[1])
