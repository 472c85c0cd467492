"""The public op `selective_scan`.

Glossary: B batch, L tokens, E channels, N state size, K convolution width. Layout: channels-last, as GEMMs produce it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import ScanInputs
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, three


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
    read          (B, K) int64: only these tokens' outputs are wanted, in this order, each token once; the others feed
                  the state and are never read out. Excludes `z`

    Activations (u, delta, B, C, z, shift) share one dtype; parameters have it too, or float32 beside half precision.
    The state and all arithmetic are in float32 at least.

    Returns y (B, L, E), with `read` (B, K, E), in the dtype of u.
    Raises KernelError for shapes, dtypes or devices that do not fit.
    """
    # Counts of tokens: half precision could not hold them.
    gap = None if gap is None else gap.to(torch.promote_types(u.dtype, torch.float32))
    tensors = (u, delta, A, B, C, D, z, delta_bias, shift, gap_delta)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    y: Tensor = torch.ops.ssmprune.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse, read, keep
    )[0]
    return y


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


def _check(inputs: ScanInputs, **outputs: Tensor) -> None:
    """Raise KernelError for what does not fit; `outputs` are of the size of u."""
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
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y, and the states that the backward pass starts from if `keep` says that there will be one."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse, read)
    _check(inputs)
    backend = pick(u, A.shape[1])
    own = read if backend.skips_reading else None
    inputs = inputs._replace(read=own)
    y, states = backend.scan_keeping(inputs) if keep else (backend.scan(inputs), u.new_empty(0))
    return y if read is None or own is not None else y.gather(1, read[..., None].expand(-1, -1, u.shape[2])), states


def _scan_fake(u: Tensor, delta: Tensor, A: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, read, keep = others
    _check(ScanInputs(u, delta, A, *others[:-1]))
    y = u.new_empty(u.shape if read is None else (*read.shape, u.shape[2]))
    if not keep:
        return y, u.new_empty(0)
    (batch, length, channels), state = u.shape, A.shape[1]
    kept = pick(u, int(state)).kept_states(length)
    return y, u.new_empty(batch, kept, state, channels, dtype=torch.float32)


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
    states: Tensor,
) -> list[Tensor]:
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, shift, gap, gap_delta, reverse)
    _check(inputs, grad=grad)
    found = pick(u, A.shape[1]).scan_backward(grad, inputs, states if states.numel() else None)
    return [gradient.contiguous() for gradient in found if gradient is not None]


def _scan_backward_fake(grad: Tensor, u: Tensor, *others: Any) -> list[Tensor]:
    delta, A, B, C, D, z, bias, _, shift, _, gap_delta, *_ = others
    tensors = (u, delta, A, B, C, D, z, bias, shift, gap_delta)
    return [tensor.new_empty(tensor.shape) for tensor in tensors if tensor is not None]


def _scan_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, softplus, shift, gap, gap_delta, reverse, read, _ = inputs
    _, states = output
    ctx.mark_non_differentiable(states)
    ctx.set_materialize_grads(False)  # no zeros for the states
    ctx.save_for_backward(*tensors, shift, gap, gap_delta, read, states)
    ctx.flags = (softplus, reverse)


def _scan_backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 15
    *tensors, shift, gap, gap_delta, read, states = ctx.saved_tensors
    softplus, reverse = ctx.flags
    if read is not None:
        index = read[..., None].expand(-1, -1, grad.shape[2])
        grad = grad.new_zeros(tensors[0].shape).scatter(1, index, grad)
    found = iter(
        torch.ops.ssmprune.selective_scan_backward(
            grad.contiguous(), *tensors, softplus, shift, gap, gap_delta, reverse, states
        )
    )
    gradients = [None if tensor is None else next(found) for tensor in (*tensors, shift, gap_delta)]
    # In the op's order: eight tensors, the softplus flag, shift, gap, gap_delta, the direction, the tokens read, keep.
    return (*gradients[:8], None, gradients[8], None, gradients[9], None, None, None)


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
