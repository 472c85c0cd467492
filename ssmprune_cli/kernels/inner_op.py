"""The public op `mamba_inner`: in one call, for inference, what lies between a Mamba block's two large projections.

Glossary: as in op.py; G scan directions, R rank of the step projection, M tokens that only convolutions see.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import InnerInputs, InnerParameters, pick
from ssmprune_cli.kernels.conv_op import conv_flops
from ssmprune_cli.kernels.library import Expected, check, define, three, tracing
from ssmprune_cli.kernels.op import scan_flops

_apart = False


def pack_inner(directions: Sequence[InnerParameters]) -> Tensor:
    """The parameters of all directions as `mamba_inner` takes them: (G, E (K + R + 2N + R + N + 3)), float32 at least.

    Of each direction the convolution's taps (K, E), x_weight (E, R + 2N), dt_weight (R, E), A (N, E), conv_bias, dt_bias
    and D (E,): neighbouring channels side by side, and what a product of matrices gives.
    """
    rows = [
        torch.cat([*(matrix.t().flatten() for matrix in own[:4]), *own[4:]]).to(
            torch.promote_types(own.D.dtype, torch.float32)
        )
        for own in directions
    ]
    return torch.stack(rows)


def mamba_inner(
    xz: Tensor,
    parameters: Tensor,
    d_state: int,
    d_conv: int,
    dt_rank: int,
    *,
    gap: Tensor | None = None,
    gap_delta: Tensor | None = None,
    context: Tensor | None = None,
    sources: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The inside of a Mamba block (state-spaces/mamba e9594ce, mamba_inner_ref), of all its scan directions at once.

        u = silu(conv(x))    rank, B, C = split(x_weight u)    y = scan(u, dt_weight rank, A, B, C, D, dt_bias)
        out = scale silu(z) (y in one direction + y in the other)

    xz                (B, L, 2E): x and z side by side
    parameters        from `pack_inner`, of one direction or of two, the second in reverse
    gap, gap_delta    (G, B, L), (G, E), as in `selective_scan`
    context, sources  (B, M, E), (G, B, L, K) int64, as in `sparse_conv1d`; both or none

    Returns (B, L, E). Has no gradient. Raises KernelError for what does not fit.
    """
    batch, length, width = three(xz, "xz")
    channels, directions = width // 2, len(parameters)
    size = channels * (d_conv + 2 * dt_rank + 3 * d_state + 3)
    expected: Expected = {"parameters": (parameters, (directions, size))}
    activations: Expected = {}
    if gap is not None:
        gap = gap.to(torch.promote_types(xz.dtype, torch.float32))
        expected["gap"] = (gap, (directions, batch, length))
    if gap_delta is not None:
        expected["gap_delta"] = (gap_delta, (directions, channels))
    if context is not None:
        activations["context"] = (context, (batch, context.shape[1], channels))
    check(xz, activations, expected)
    if width % 2 or directions not in (1, 2):
        raise KernelError(f"there are {width} channels in xz and {directions} directions")
    if gap_delta is not None and gap is None:
        raise KernelError("gap_delta needs gap")
    if (context is None) != (sources is None):
        raise KernelError("context and sources go together")
    if sources is not None and (sources.shape != (directions, batch, length, d_conv) or sources.dtype != torch.int64):
        raise KernelError(f"sources must be int64 of shape {(directions, batch, length, d_conv)}")
    if torch.is_grad_enabled() and (xz.requires_grad or parameters.requires_grad):
        raise KernelError("mamba_inner has no gradient", hint="Call it under torch.no_grad().")
    given = (gap, gap_delta, context, sources)
    result: Tensor = torch.ops.ssmprune.mamba_inner(xz, parameters, d_state, d_conv, dt_rank, *given, scale)
    return result


def fuses_mamba_inner(example: Tensor, d_state: int) -> bool:
    """Whether a model does well to call `mamba_inner` for tokens like `example` where it needs no gradient.

    No for a trace, which is there to see what is inside.
    """
    if _apart or tracing() or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return example.device.type == "cpu"  # the compiler cannot look for a backend; each of them has the op
    return pick(example, d_state).fuses_inner


@contextmanager
def inner_apart() -> Iterator[None]:
    """Inside, models call the ops that `mamba_inner` is made of instead: for what watches or measures each of them."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def _inner(
    xz: Tensor,
    parameters: Tensor,
    d_state: int,
    d_conv: int,
    dt_rank: int,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    context: Tensor | None,
    sources: Tensor | None,
    scale: float,
) -> Tensor:
    inputs = InnerInputs(xz, parameters, d_state, d_conv, dt_rank, gap, gap_delta, context, sources, scale)
    return pick(xz, max(d_state, d_conv)).mamba_inner(inputs)


def _fake(xz: Tensor, *others: Any) -> Tensor:
    return xz.new_empty(xz.shape[0], xz.shape[1], xz.shape[2] // 2)


define("mamba_inner", _inner, _fake)


# torch's counter counts a multiply-add as two floating-point operations.
@register_flop_formula(torch.ops.ssmprune.mamba_inner)
def _(xz: Any, parameters: Any, d_state: int, d_conv: int, dt_rank: int, *_: Any, **__: Any) -> int:
    batch, length, width = xz
    channels = width // 2
    projections = batch * length * channels * 2 * (dt_rank + d_state)
    scan = scan_flops(batch, length, channels, d_state, has_D=True, has_z=False)
    return int(2 * parameters[0] * (conv_flops(batch, length, channels, d_conv) + projections + scan))
