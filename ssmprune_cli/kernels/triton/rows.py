"""What surrounds the scans in Triton, forward and backward: add + RMSNorm, and the gated sum of the directions.

Each op reads its inputs once and writes its results once. Rows are tokens of all batch entries, (B * L, channels); sums
are in float32 and in a fixed order.
"""

# Kernels are compiled by Triton, whose types are not those of Python.
# mypy: ignore-errors

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssmprune_cli.kernels.triton.scan import read, sigmoid

MOST_YS = 4  # directions
_TILE = 2048  # values that a program works on at once
_ROWS_PER_PROGRAM = 64  # whose weight gradients are one partial sum


@triton.jit
def norm_forward(
    hidden,
    residual,
    weight,
    normed,  # out, (rows, channels), as stream
    stream,
    rows,
    channels,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.arange(0, BLOCK_E)
    mask = (r < rows)[:, None] & (e < channels)[None, :]
    at = r[:, None] * channels + e[None, :]
    total = read(hidden + at, mask)
    if HAS_RESIDUAL:
        total += read(residual + at, mask)
    tl.store(stream + at, total, mask=mask)
    scale = 1.0 / tl.sqrt(tl.sum(total * total, axis=1) / channels + eps)
    result = total * scale[:, None] * read(weight + e, e < channels)[None, :]
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward(
    d_normed,
    d_stream,
    stream,
    weight,
    d_sum,  # out, (rows, channels) float32: gradient of hidden and of residual
    d_weight,  # out, (programs, channels): sums over a program's rows
    rows,
    channels,
    eps,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    e = tl.arange(0, BLOCK_E)
    inside = e < channels
    w = read(weight + e, inside)
    total = tl.zeros((BLOCK_E,), tl.float32)
    for first in range(0, ROWS, BLOCK_R):
        r = tl.program_id(0).to(tl.int64) * ROWS + first + tl.arange(0, BLOCK_R)
        mask = (r < rows)[:, None] & inside[None, :]
        at = r[:, None] * channels + e[None, :]
        values, grad = read(stream + at, mask), read(d_normed + at, mask)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / channels + eps)
        unit = values * scale[:, None]
        d_unit = grad * w[None, :]
        along = tl.sum(d_unit * unit, axis=1) / channels
        result = read(d_stream + at, mask) + scale[:, None] * (d_unit - unit * along[:, None])
        tl.store(d_sum + at, result, mask=mask)
        total += tl.sum(grad * unit, axis=0)
    tl.store(d_weight + tl.program_id(0).to(tl.int64) * channels + e, total, mask=inside)


@triton.jit
def sum_of(y0, y1, y2, y3, at, mask, COUNT: tl.constexpr):
    total = read(y0 + at, mask)
    if COUNT > 1:
        total += read(y1 + at, mask)
    if COUNT > 2:
        total += read(y2 + at, mask)
    if COUNT > 3:
        total += read(y3 + at, mask)
    return total


@triton.jit
def gate_forward(
    y0,
    y1,
    y2,
    y3,
    z,
    out,  # out, (rows, channels)
    z_l,
    rows,
    channels,
    scale,
    COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (r < rows)[:, None] & (e < channels)[None, :]
    at = r[:, None] * channels + e[None, :]
    gate = read(z + r[:, None] * z_l + e[None, :], mask)
    result = sum_of(y0, y1, y2, y3, at, mask, COUNT) * gate * sigmoid(gate) * scale
    tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(
    grad,
    y0,
    y1,
    y2,
    y3,
    z,
    d_y,  # out, (rows, channels), as d_z
    d_z,
    z_l,
    rows,
    channels,
    scale,
    COUNT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (r < rows)[:, None] & (e < channels)[None, :]
    at = r[:, None] * channels + e[None, :]
    gate = read(z + r[:, None] * z_l + e[None, :], mask)
    sigma = sigmoid(gate)
    through = read(grad + at, mask) * scale
    tl.store(d_y + at, (through * gate * sigma).to(d_y.dtype.element_ty), mask=mask)
    result = through * sum_of(y0, y1, y2, y3, at, mask, COUNT) * sigma * (1.0 + gate * (1.0 - sigma))
    tl.store(d_z + at, result.to(d_z.dtype.element_ty), mask=mask)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `row_ops.add_rms_norm`."""
    hidden = hidden.contiguous()
    channels = hidden.shape[2]
    normed = torch.empty(hidden.shape, dtype=weight.dtype, device=hidden.device)
    stream = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    rows = hidden.shape[0] * hidden.shape[1]
    if hidden.numel():
        block_r, block_e = _blocks(channels)
        with torch.cuda.device_of(hidden):
            norm_forward[(-(-rows // block_r),)](
                hidden,
                hidden if residual is None else residual.contiguous(),
                weight.contiguous(),
                normed,
                stream,
                rows,
                channels,
                eps,
                HAS_RESIDUAL=residual is not None,
                BLOCK_R=block_r,
                BLOCK_E=block_e,
            )
    return normed, stream


def add_rms_norm_backward(
    d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See `Backend.add_rms_norm_backward`."""
    channels = stream.shape[2]
    rows = stream.shape[0] * stream.shape[1]
    d_sum = torch.empty(stream.shape, dtype=torch.float32, device=stream.device)
    programs = -(-rows // _ROWS_PER_PROGRAM)
    d_weight = torch.empty(programs, channels, dtype=torch.float32, device=stream.device)
    if stream.numel():
        block_r, block_e = _blocks(channels)
        with torch.cuda.device_of(stream):
            norm_backward[(programs,)](
                d_normed.contiguous(),
                d_stream.contiguous(),
                stream.contiguous(),
                weight.contiguous(),
                d_sum,
                d_weight,
                rows,
                channels,
                eps,
                ROWS=_ROWS_PER_PROGRAM,
                BLOCK_R=min(block_r, _ROWS_PER_PROGRAM),
                BLOCK_E=block_e,
            )
    return d_sum, d_weight.sum(dim=0).to(weight.dtype)


def gated_sum(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    """See `row_ops.gated_sum`; for up to MOST_YS terms."""
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if out.numel():
        _launch_gate(gate_forward, (), ys, z, (out,), scale)
    return out


def gated_sum_backward(grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """See `Backend.gated_sum_backward`."""
    d_y, d_z = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for _ in range(2))
    if d_y.numel():
        _launch_gate(gate_backward, (grad.contiguous(),), ys, z, (d_y, d_z), scale)
    return d_y, d_z


def _launch_gate(kernel, before: tuple, ys: Sequence[Tensor], z: Tensor, outputs: tuple, scale: float) -> None:
    batch, length, channels = z.shape
    # A gate is half of a projection: its rows are apart, but evenly so across the batch.
    if z.stride(2) != 1 or (batch > 1 and z.stride(0) != length * z.stride(1)):
        z = z.contiguous()
    values = [y.contiguous() for y in ys]
    block_r, block_e = _blocks(min(channels, 1024))
    with torch.cuda.device_of(z):
        kernel[(-(-batch * length // block_r), -(-channels // block_e))](
            *before,
            *values,
            *[values[0]] * (MOST_YS - len(values)),
            z,
            *outputs,
            z.stride(1),
            batch * length,
            channels,
            scale,
            COUNT=len(values),
            BLOCK_R=block_r,
            BLOCK_E=block_e,
        )


def _blocks(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile."""
    block_e = triton.next_power_of_2(channels)
    return max(1, _TILE // block_e), block_e
