"""The public op `selective_scan`.

Glossary: B batch, L tokens, E channels, N state size, K convolution width. Layout: channels-last, as GEMMs produce it.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import ScanInputs
from ssmprune_cli.kernels.ops.library import Expected, check, check_state, counted, define, state_dtype, three


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    shift: Tensor | None = ...,
    gap: Tensor | None = ...,
    gap_delta: Tensor | None = ...,
    reverse: bool = ...,
    read: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[False] = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    delta_bias: Tensor | None = ...,
    *,
    delta_softplus: bool = ...,
    shift: Tensor | None = ...,
    gap: Tensor | None = ...,
    gap_delta: Tensor | None = ...,
    reverse: bool = ...,
    read: Tensor | None = ...,
    initial_state: Tensor | None = ...,
    return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...


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
    read: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
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
    read          (B, K) int64: only these tokens' outputs are wanted, in this order, each token once; the others feed
                  the state and are never read out. Excludes `z`
    initial_state (B, E, N): h before the first token in scan direction, in float32 at least; zeros without
    return_state  whether h after the last token in scan direction is wanted too

    Activations (u, delta, B, C, z, shift) share one dtype; parameters have it too, or float32 beside half precision.
    The state and all arithmetic are in float32 at least.

    Returns y (B, L, E), with `read` (B, K, E), in the dtype of u; with `return_state` a pair of it and the state
    (B, E, N), in float32 at least. Gradients flow through both, and to the initial state.
    Raises KernelError for shapes, dtypes or devices that do not fit.
    """
    # Counts of tokens: half precision could not hold them.
    gap = None if gap is None else gap.to(torch.promote_types(u.dtype, torch.float32))
    tensors = (u, delta, A, B, C, D, z, delta_bias, shift, gap_delta, initial_state)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    flags = (reverse, read, initial_state, return_state, keep)
    y: Tensor
    y, state, _ = torch.ops.ssmprune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, *flags
    )
    return (y, state) if return_state else y


def scan_flops(
    batch: int,
    length: int,
    channels: int,
    state: int,
    *,
    has_D: bool,
    has_z: bool = False,
    aligned: bool = False,
    read: int | None = None,
) -> int:
    """Multiply-adds of a scan: 9 B L E N, and B L E each for D and the gate (state-spaces/mamba issue 110; VMamba) and
    for alignment, delta + gap * gap_delta.

    Two of the nine, and D, are the reading of the state: only `read` of the tokens cost them if it is given.
    """
    skipped = 0 if read is None else length - read
    return batch * channels * (length * (9 * state + has_D + has_z + aligned) - skipped * (2 * state + has_D))


def _check(inputs: ScanInputs, d_last: Tensor | None = None, **outputs: Tensor) -> None:
    """Raise KernelError for what does not fit; `outputs` are of the size of u, `d_last` of the state's."""
    u, A, z, read = inputs.u, inputs.A, inputs.z, inputs.read
    batch, length, channels = three(u, "u")
    state = A.shape[-1]
    tokens, states, channel = (batch, length, channels), (batch, length, state), (channels,)
    activations: Expected = {"delta": (inputs.delta, tokens), "B": (inputs.B, states), "C": (inputs.C, states)}
    parameters: Expected = {"A": (A, (channels, state))}
    for name, values in (("z", z), ("shift", inputs.shift), *outputs.items()):
        if values is not None:
            activations[name] = (values, tokens)
    if inputs.gap is not None:
        parameters["gap"] = (inputs.gap, (batch, length))
    for name, values in (("D", inputs.D), ("delta_bias", inputs.delta_bias), ("gap_delta", inputs.gap_delta)):
        if values is not None:
            parameters[name] = (values, channel)
    check(u, activations, parameters)
    for name, values in (("initial_state", inputs.initial_state), ("d_last", d_last)):
        if values is not None:
            check_state(name, values, (batch, channels, state), u)
    if inputs.shift is not None and inputs.gap is not None:
        raise KernelError("shift and gap exclude each other")
    if inputs.gap_delta is not None and inputs.gap is None:
        raise KernelError("gap_delta needs gap")
    if read is not None:
        if z is not None:
            raise KernelError("read and z exclude each other")
        if read.dtype != torch.int64 or read.ndim != 2 or read.shape[0] != batch or read.device != u.device:
            raise KernelError(f"read must be int64 (B, K) beside u, not {read.dtype} {tuple(read.shape)}")


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
    read: Tensor | None,
    initial_state: Tensor | None,
    return_state: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state if it is wanted, and the states that the backward pass starts from if `keep` says that there
    will be one."""
    inputs = ScanInputs(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse, read, initial_state
    )
    _check(inputs)
    backend = pick(u, A.shape[1], initial_state is not None or (return_state and keep))
    own = read if backend.skips_reading else None
    inputs = inputs._replace(read=own)
    last, states = u.new_empty(0), u.new_empty(0)
    if return_state or keep:
        y, state, kept = backend.scan_with_states(inputs, keep)
        last, states = state if return_state else last, kept if keep else states
    else:
        y = backend.scan(inputs)
    y = y if read is None or own is not None else y.gather(1, read[..., None].expand(-1, -1, u.shape[2]))
    return y, last, states


def _scan_fake(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, return_state, keep = others
    inputs = ScanInputs(u, delta, A, *given)
    _check(inputs)
    (batch, length, channels), state = u.shape, A.shape[1]
    y = u.new_empty(u.shape if inputs.read is None else (*inputs.read.shape, channels))
    last, states = u.new_empty(0), u.new_empty(0)
    if return_state:
        last = u.new_empty(batch, channels, state, dtype=state_dtype(u))
    if keep:
        kept = pick(u, int(state), inputs.initial_state is not None or return_state).kept_states(length)
        states = u.new_empty(batch, kept, state, channels, dtype=torch.float32)
    return y, last, states


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
    initial_state: Tensor | None,
    d_last: Tensor | None,
    states: Tensor,
) -> list[Tensor]:
    inputs = ScanInputs(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse, None, initial_state
    )
    _check(inputs, d_last, grad=grad)
    backend = pick(u, A.shape[1], initial_state is not None or d_last is not None)
    found = backend.scan_backward(grad, inputs, states if states.numel() else None, d_last)
    return [gradient.contiguous() for gradient in found if gradient is not None]


def _scan_backward_fake(grad: Tensor, u: Tensor, *others: Any) -> list[Tensor]:
    delta, A, B, C, D, z, bias, _, shift, _, gap_delta, _, initial_state, *_ = others
    tensors = (u, delta, A, B, C, D, z, bias, shift, gap_delta, initial_state)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, softplus, shift, gap, gap_delta, reverse, read, initial_state, return_state, _ = inputs
    _, last, states = output
    ctx.mark_non_differentiable(*((states,) if return_state else (last, states)))
    ctx.set_materialize_grads(False)  # no zeros for the states
    ctx.save_for_backward(*tensors, shift, gap, gap_delta, read, initial_state, states)
    ctx.flags = (softplus, reverse)


def _scan_backward(ctx: Any, grad: Tensor | None, d_last: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None and d_last is None:
        return (None,) * 17
    *tensors, shift, gap, gap_delta, read, initial_state, states = ctx.saved_tensors
    softplus, reverse = ctx.flags
    u = tensors[0]
    if grad is None:
        grad = torch.zeros_like(u)
    elif read is not None:
        index = read[..., None].expand(-1, -1, grad.shape[2])
        grad = grad.new_zeros(u.shape).scatter(1, index, grad)
    found = iter(
        torch.ops.ssmprune.selective_scan_backward(
            grad.contiguous(), *tensors, softplus, shift, gap, gap_delta, reverse, initial_state, d_last, states
        )
    )
    taken = (*tensors, shift, gap_delta, initial_state)
    gradients = [None if tensor is None else next(found) for tensor in taken]
    # In the op's order: eight tensors, the softplus flag, shift, gap, gap_delta, the direction, the tokens read, the
    # initial state, and two flags.
    return (*gradients[:8], None, gradients[8], None, gradients[9], None, None, gradients[10], None, None)


define("selective_scan", _scan_op, _scan_fake, backward=_scan_backward, setup=_scan_setup)
define("selective_scan_backward", _scan_backward_op, _scan_backward_fake)


@counted("selective_scan")
def _(
    u: Any,
    delta: Any,
    A: Any,
    B: Any,
    C: Any,
    D: Any,
    z: Any,
    delta_bias: Any,
    delta_softplus: Any,
    shift: Any,
    gap: Any,
    gap_delta: Any,
    reverse: Any,
    read: Any,
    *_: Any,
    **__: Any,
) -> int:
    aligned = shift is not None or gap is not None
    count = None if read is None else read[1]
    batch, length, channels = u
    has_D, has_z = D is not None, z is not None
    return scan_flops(batch, length, channels, A[1], has_D=has_D, has_z=has_z, aligned=aligned, read=count)
