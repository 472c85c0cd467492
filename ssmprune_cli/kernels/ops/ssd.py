"""The public op `ssd_scan`: Mamba-2's scan, whose heads have one rate of decay and one step a token each.

Glossary: B batch, L tokens, H heads, P channels of a head, G groups of heads that share B and C, N state size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import SSD_GRADIENTS, SsdInputs
from ssmprune_cli.kernels.ops.library import Expected, check, check_state, counted, define, state_dtype, tracing
from ssmprune_cli.kernels.pytorch import SSD_CHUNK


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = True,
    shift: Tensor | None = None,
    gap: Tensor | None = None,
    gap_delta: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan (Dao and Gu 2024, "Transformers are SSMs"; state-spaces/mamba e9594ce), aligned over gaps.

        step_t = softplus(dt_t + dt_bias)
        h_t = exp((step_t + s_t) A) h_{t-1} + step_t x_t B_t^T        y_t = h_t C_t + D x_t

    x             (B, L, H, P)
    dt            (B, L, H)
    A             (H,), negative: -exp(A_log)
    B, C          (B, L, G, N): heads h of H belong to group h // (H / G)
    D, dt_bias    (H,)
    shift         (B, L, H): s, the steps of the pruned tokens just before each token
    gap           (B, L): s_t = gap_t * gap_delta with `gap_delta` (H,), or gap_t * step_t without. Excludes `shift`;
                  no gradient flows to it
    initial_state (B, H, P, N): h before the first token, in float32 at least; zeros without

    Activations (x, dt, B, C, shift) share one dtype; parameters have it too, or float32 beside half precision.
    The state and all arithmetic are in float32 at least.

    Returns y (B, L, H, P) in the dtype of x, and h after the last token (B, H, P, N), in float32 at least; it is there
    anyway. Raises KernelError for shapes, dtypes or devices that do not fit.
    """
    gap = None if gap is None else gap.to(state_dtype(x))  # counts of tokens: half precision could not hold them
    both: tuple[Tensor, Tensor] = torch.ops.ssmprune.ssd_scan(
        x, dt, A, B, C, D, dt_bias, dt_softplus, shift, gap, gap_delta, initial_state
    )
    return both


def ssd_flops(
    batch: int,
    length: int,
    heads: int,
    width: int,
    groups: int,
    state: int,
    *,
    has_D: bool,
    aligned: bool = False,
) -> int:
    """Multiply-adds of a scan, as the paper counts its matrix products (section 6) with chunks of Q = 64 tokens.

    For each token C B^T takes G Q N, its product with x H Q P, the chunk's state and its reading H P N each, D H P and
    alignment H. Q is L for shorter sequences.
    """
    chunk = min(length, SSD_CHUNK)
    token = groups * chunk * state + heads * (width * (chunk + 2 * state + has_D) + aligned)
    return batch * length * token


def _check(inputs: SsdInputs, d_y: Tensor | None = None, d_last: Tensor | None = None) -> None:
    """Raise KernelError for what does not fit; `d_y` and `d_last` are of the size of y and of the state."""
    x, B = inputs.x, inputs.B
    if x.ndim != 4 or B.ndim != 4:
        sizes = f"not {tuple(x.shape)} and {tuple(B.shape)}"
        raise KernelError(
            f"x must have shape (batch, tokens, heads, channels) and B (batch, tokens, groups, N), {sizes}"
        )
    batch, length, heads, width = x.shape
    groups, state = B.shape[2:]
    if not tracing() and (groups == 0 or heads % groups):
        raise KernelError(f"{heads} heads cannot share {groups} groups of B and C")
    tokens, each = (batch, length, groups, state), (heads,)
    activations: Expected = {"dt": (inputs.dt, (batch, length, heads)), "B": (B, tokens), "C": (inputs.C, tokens)}
    parameters: Expected = {"A": (inputs.A, each)}
    if inputs.shift is not None:
        activations["shift"] = (inputs.shift, (batch, length, heads))
    if d_y is not None:
        activations["grad"] = (d_y, tuple(x.shape))
    if inputs.gap is not None:
        parameters["gap"] = (inputs.gap, (batch, length))
    for name, values in (("D", inputs.D), ("dt_bias", inputs.dt_bias), ("gap_delta", inputs.gap_delta)):
        if values is not None:
            parameters[name] = (values, each)
    check(x, activations, parameters)
    for name, values in (("initial_state", inputs.initial_state), ("d_last", d_last)):
        if values is not None:
            check_state(name, values, (batch, heads, width, state), x)
    if inputs.shift is not None and inputs.gap is not None:
        raise KernelError("shift and gap exclude each other")
    if inputs.gap_delta is not None and inputs.gap is None:
        raise KernelError("gap_delta needs gap")


def _ssd_op(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    shift: Tensor | None,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, dt_softplus, shift, gap, gap_delta, initial_state)
    _check(inputs)
    y, last = pick(x, 1).ssd(inputs)
    return y.contiguous(), last.contiguous()


def _ssd_fake(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    _check(SsdInputs(x, dt, A, B, *others))
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty(batch, heads, width, B.shape[3], dtype=state_dtype(x))


def _ssd_backward_op(
    grad: Tensor,
    d_last: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    shift: Tensor | None,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor]:
    inputs = SsdInputs(x, dt, A, B, C, D, dt_bias, dt_softplus, shift, gap, gap_delta, initial_state)
    _check(inputs, grad, d_last)
    found = pick(x, 1).ssd_backward(grad, inputs, d_last)
    return [gradient.contiguous() for gradient in found if gradient is not None]


def _ssd_backward_fake(grad: Tensor, d_last: Tensor | None, *given: Any) -> list[Tensor]:
    inputs = SsdInputs(*given)
    tensors = (getattr(inputs, name) for name in SSD_GRADIENTS)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _ssd_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    given = SsdInputs(*inputs)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given[:7], *given[8:])
    ctx.dt_softplus = given.dt_softplus


def _ssd_backward(ctx: Any, grad: Tensor | None, d_last: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None and d_last is None:
        return (None,) * len(SsdInputs._fields)
    saved = ctx.saved_tensors
    inputs = SsdInputs._make((*saved[:7], ctx.dt_softplus, *saved[7:]))
    grad = torch.zeros_like(inputs.x) if grad is None else grad.contiguous()
    found = iter(torch.ops.ssmprune.ssd_scan_backward(grad, d_last, *inputs))
    gradients = {name: next(found) for name in SSD_GRADIENTS if getattr(inputs, name) is not None}
    return tuple(gradients.get(name) for name in SsdInputs._fields)


define("ssd_scan", _ssd_op, _ssd_fake, backward=_ssd_backward, setup=_ssd_setup)
define("ssd_scan_backward", _ssd_backward_op, _ssd_backward_fake)


@counted("ssd_scan")
def _(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    dt_bias: Any,
    dt_softplus: Any,
    shift: Any,
    gap: Any,
    *_: Any,
    **__: Any,
) -> int:
    batch, length, heads, width = x
    aligned = shift is not None or gap is not None
    return ssd_flops(batch, length, heads, width, B[2], B[3], has_D=D is not None, aligned=aligned)
