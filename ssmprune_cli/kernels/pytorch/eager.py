"""The small ops in plain PyTorch: what every backend computes unless it has something faster.

Half precision is computed in float32, as the kernels do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.inputs import GridConvInputs


def wide(tensor: Tensor) -> Tensor:
    """`tensor` in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """silu(depthwise causal convolution): token t sees t - K + 1 ... t, or t ... t + K - 1 in reverse."""
    width = weight.shape[1]
    kernel = wide(weight.flip(1) if reverse else weight)
    pad = (0, width - 1) if reverse else (width - 1, 0)
    channels_first = functional.pad(wide(x).transpose(1, 2), pad)  # (B, E, L + K - 1)
    y = functional.conv1d(channels_first, kernel[:, None], wide(bias), groups=weight.shape[0])
    return functional.silu(y).transpose(1, 2).to(x.dtype).contiguous()


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its own precision."""
    width, length = weight.shape[1], x.shape[1]
    taps = wide(weight)
    pad = (0, 0, 0, width - 1) if reverse else (0, 0, width - 1, 0)
    padded = functional.pad(wide(x), pad)  # (B, L + K - 1, E)
    # Tap k of `weight` meets the token k - K + 1 places away, or K - 1 - k in reverse.
    offsets = [width - 1 - k if reverse else k for k in range(width)]
    y = bias + sum(padded[:, offset : offset + length] * taps[:, k] for k, offset in enumerate(offsets))
    gate = torch.sigmoid(y)
    d_y = grad * gate * (1 + y * (1 - gate))
    d_padded, d_weight = torch.zeros_like(padded), torch.empty_like(taps)
    for k, offset in enumerate(offsets):
        d_padded[:, offset : offset + length] += d_y * taps[:, k]
        d_weight[:, k] = (d_y * padded[:, offset : offset + length]).sum(dim=(0, 1))
    start = 0 if reverse else width - 1
    d_x = d_padded[:, start : start + length]
    return d_x.to(x.dtype), d_weight.to(weight.dtype), d_y.sum(dim=(0, 1)).to(bias.dtype)


def sparse_conv_silu(x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(convolution whose tap k of token t meets row sources[t, k] of x followed by context, or nothing for -1)."""
    rows = torch.cat((wide(x), wide(context)), dim=1)
    y = wide(bias).expand(x.shape)
    for k in range(weight.shape[1]):
        index = sources[..., k, None]  # (B, L, 1)
        met = rows.gather(1, index.clamp(min=0).expand(-1, -1, x.shape[2])) * (index >= 0)
        y = y + met * weight[:, k]
    return functional.silu(y).to(x.dtype)


def sparse_conv_gradients(
    grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, context, weight and bias, each in its own precision."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, context, weight, bias)]
    with torch.enable_grad():
        y = sparse_conv_silu(leaves[0], leaves[1], sources, leaves[2], leaves[3])
        d_x, d_context, d_weight, d_bias = torch.autograd.grad(y, leaves, grad)
    return d_x, d_context, d_weight, d_bias


def grid_conv_silu(inputs: GridConvInputs) -> Tensor:
    """silu(depthwise convolution over the grid) of the first tokens, the tokens that are missing being 0."""
    x, weight, bias, rows, columns, positions, outputs = inputs
    batch, _, channels = x.shape
    dense, index = wide(x), None
    if positions is not None:
        index = positions[..., None].expand(-1, -1, channels)  # (B, L, E)
        dense = dense.new_zeros(batch, rows * columns, channels).scatter(1, index, dense)
    image = dense.transpose(1, 2).unflatten(2, (rows, columns))  # (B, E, rows, columns)
    bias = None if bias is None else wide(bias)
    image = functional.conv2d(image, wide(weight)[:, None], bias, padding=weight.shape[-1] // 2, groups=channels)
    y = functional.silu(image).flatten(2).transpose(1, 2)  # (B, rows * columns, E)
    return (y[:, :outputs] if index is None else y.gather(1, index[:, :outputs])).to(x.dtype).contiguous()


def grid_conv_gradients(grad: Tensor, inputs: GridConvInputs) -> tuple[Tensor, ...]:
    """Gradients of x, weight and, if there is one, bias."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3] if tensor is not None]
    with torch.enable_grad():
        bias = None if inputs.bias is None else leaves[2]
        y = grid_conv_silu(inputs._replace(x=leaves[0], weight=leaves[1], bias=bias))
        return torch.autograd.grad(y, leaves, grad)


def add_rms_norm(hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(normed, stream): stream = hidden + residual, at least float32; normed = weight * stream / root mean square."""
    stream = wide(hidden) if residual is None else residual + hidden
    normed = stream * torch.rsqrt(stream.square().mean(dim=-1, keepdim=True) + eps)
    return (normed * weight).to(weight.dtype), stream


def gated_sum(ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
    """(sum of ys) * silu(z) * scale."""
    total = wide(ys[0])
    for y in ys[1:]:
        total = total + y
    return (total * functional.silu(wide(z)) * scale).to(z.dtype)


def add_rms_norm_gradients(
    d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum that is normalised, and of weight."""
    scale = torch.rsqrt(stream.square().mean(dim=-1, keepdim=True) + eps)
    d_normed, unit = wide(d_normed), stream * scale
    d_unit = d_normed * weight
    d_sum = d_stream + scale * (d_unit - unit * (d_unit * unit).mean(dim=-1, keepdim=True))
    return d_sum, (d_normed * unit).sum(dim=(0, 1)).to(weight.dtype)


def gated_sum_gradients(grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of each of ys, and of z."""
    wide_z, wide_grad = wide(z), wide(grad) * scale
    gate = torch.sigmoid(wide_z)
    total = sum(map(wide, ys[1:]), wide(ys[0]))
    d_y = (wide_grad * wide_z * gate).to(z.dtype)
    return d_y, (wide_grad * total * gate * (1 + wide_z * (1 - gate))).to(z.dtype)
