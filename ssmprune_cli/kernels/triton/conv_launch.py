"""Launches the kernels of `conv` and `sparse_conv` for the backend `triton`; imports Triton when it first does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_TAPS = 4
BLOCK_L, BLOCK_E = 16, 64  # tokens and channels of a tile
BLOCK = 256  # entries of `sources` of a program
ENOUGH_PROGRAMS = 2048  # keep a GPU busy; with more tiles a program takes several, and leaves fewer sums to add up


class Conv:
    """One call for up to MAX_TAPS taps; arguments as in `conv_op.causal_conv1d`."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> None:
        x = x if x.stride(2) == 1 else x.contiguous()
        batch, length, channels = x.shape
        self._tensors = (x, weight.t().contiguous(), bias.contiguous())
        self._strides = x.stride()[:2]
        self._sizes = (length, channels)
        self._grid = (-(-channels // BLOCK_E), -(-length // BLOCK_L), batch)
        self._flags = _flags(weight) | {"REVERSE": reverse}

    def forward(self) -> Tensor:
        from ssmprune_cli.kernels.triton.conv import conv_forward

        x = self._tensors[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if y.numel():
            with torch.cuda.device_of(x):
                conv_forward[self._grid](*self._tensors, y, *self._strides, *self._sizes, **self._flags)
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from ssmprune_cli.kernels.triton.conv import conv_backward, conv_backward_input

        x, taps, bias = self._tensors
        if x.numel() == 0:
            return torch.zeros_like(x), torch.zeros_like(taps.t()), torch.zeros_like(bias)
        columns, tiles, batch = self._grid
        repeat = 1
        while 2 * repeat <= min(tiles, columns * tiles * batch // ENOUGH_PROGRAMS):
            repeat *= 2
        parts = -(-tiles // repeat)
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inner = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        d_taps = inner.new_empty(batch, parts, *taps.shape)
        d_bias = inner.new_empty(batch, parts, *bias.shape)
        with torch.cuda.device_of(x):
            conv_backward[(columns, parts, batch)](
                *self._tensors,
                grad.contiguous(),
                inner,
                d_taps,
                d_bias,
                *self._strides,
                *self._sizes,
                REPEAT=repeat,
                **self._flags,
            )
            conv_backward_input[self._grid](inner, taps, d_x, *self._sizes, **self._flags)
        return d_x, d_taps.sum(dim=(0, 1)).t().to(taps.dtype), d_bias.sum(dim=(0, 1)).to(bias.dtype)


class SparseConv:
    """One call; arguments as in `conv_op.sparse_conv1d`. A source that is no row counts as -1: it cannot raise."""

    def __init__(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> None:
        x, context = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (x, context))
        self._batch, self._length, channels = x.shape
        self._tensors = (x, context, sources.contiguous(), weight.t().contiguous(), bias.contiguous())
        self._strides = (*x.stride()[:2], *context.stride()[:2])
        self._sizes = (self._length, context.shape[1], channels)
        self._flags = _flags(weight)

    def forward(self) -> Tensor:
        from ssmprune_cli.kernels.triton.sparse_conv import sparse_conv_forward

        x = self._tensors[0]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if y.numel():
            with torch.cuda.device_of(x):
                sparse_conv_forward[self._grid(self._length)](
                    *self._tensors, y, *self._strides, *self._sizes, **self._flags
                )
        return y

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from ssmprune_cli.kernels.triton.sparse_conv import (
            list_meetings,
            sparse_conv_backward,
            sparse_conv_backward_rows,
        )

        x, context, sources, taps, bias = self._tensors
        if x.numel() == 0:
            return torch.zeros_like(x), torch.zeros_like(context), torch.zeros_like(taps.t()), torch.zeros_like(bias)
        grid, rows, width = self._grid(self._length), self._length + context.shape[1], taps.shape[0]
        d_x, d_context = (torch.empty(given.shape, dtype=x.dtype, device=x.device) for given in (x, context))
        inner = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        d_taps = inner.new_empty(self._batch, grid[1], *taps.shape)
        d_bias = inner.new_empty(self._batch, grid[1], *bias.shape)
        first = torch.full((self._batch, rows, width), -1, dtype=torch.int32, device=x.device)
        following = torch.empty(sources.shape, dtype=torch.int32, device=x.device)
        entries = sources.numel()
        with torch.cuda.device_of(x):
            sparse_conv_backward[grid](
                *self._tensors, grad.contiguous(), inner, d_taps, d_bias, *self._strides, *self._sizes, **self._flags
            )
            list_meetings[(-(-entries // BLOCK),)](
                sources, first, following, entries, *self._sizes[:2], WIDTH=width, BLOCK=BLOCK
            )
            sparse_conv_backward_rows[self._grid(rows)](
                inner, taps, first, following, d_x, d_context, *self._sizes, **self._flags
            )
        d_weight = d_taps.sum(dim=(0, 1)).t().to(taps.dtype)
        return d_x, d_context, d_weight, d_bias.sum(dim=(0, 1)).to(bias.dtype)

    def _grid(self, rows: int) -> tuple[int, int, int]:
        return -(-self._sizes[2] // BLOCK_E), -(-rows // BLOCK_L), self._batch


def _flags(weight: Tensor) -> dict[str, Any]:
    """What every kernel gets; `weight` is (E, K)."""
    tile = {"WIDTH": weight.shape[1], "BLOCK_L": BLOCK_L, "BLOCK_E": BLOCK_E}
    return tile | {"num_warps": 4, "enable_fp_fusion": True}
