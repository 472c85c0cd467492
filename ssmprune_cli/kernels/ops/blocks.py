"""The public ops `mamba_inner` and `mamba_blocks`: what many small ops would do of Mamba blocks, in one; for inference.

Glossary: as in inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import BlocksInputs, InnerInputs, tokens_and_steps
from ssmprune_cli.kernels.ops.conv import conv_flops
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, refuse_gradients, three
from ssmprune_cli.kernels.ops.scan import scan_flops
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes
from ssmprune_cli.kernels.products import products_size

_PARTS = {torch.float32: (0, FLOAT_PARTS), torch.bfloat16: (0, 1)}  # that a model in this dtype may have its weights in


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
    read: Tensor | None = None,
    cells: Tensor | None = None,
    size: Tensor | None = None,
    mass: Tensor | None = None,
    scale: float = 1.0,
    products: Tensor | None = None,
) -> Tensor:
    """The inside of a Mamba block (state-spaces/mamba e9594ce, mamba_inner_ref), of all its scan directions at once.

        u = silu(conv(x))    rank, B, C = split(x_weight u)    y = scan(u, dt_weight rank, A, B, C, D, dt_bias)
        out = scale silu(z) (y in one direction + y in the other)

    xz                (B, L, 2E): x and z side by side
    parameters        from `pack_inner`, of one direction or of two, the second in reverse
    gap, gap_delta    (G, B, S), (G, E), as in `selective_scan`
    context, sources  (B, M, E), (G, B, T, K) int64, as in `sparse_conv1d`; both or none. T tokens are convolved: L, or
                      more with `read`, which then are L rows of xz and at least T - L of the context's
    read              (B, L) int64: which of the T tokens each row of xz is. Scans take S = T steps, of which only these
                      are read, or with `cells` S = L
    cells             (B, L) int64, rising: the end of each token's cell among the T tokens. It takes one step for its
                      cell, of the mean of their convolutions, in which those that are not `read` count `mass` times as
                      much as it does; D is times its own
    size, mass        (B, S), (): tokens that each step stands for. What it puts into the state is times
                      1 + mass (size - 1), and so is its decay if there is no gap; both or none
    products          from `pack_products` in the dtype of xz: the weights of `parameters` that matrices are multiplied
                      with, once more. Without it a backend that multiplies in that dtype converts them at each call

    Returns (B, L, E). Has no gradient. Raises KernelError for what does not fit.
    """
    width = three(xz, "xz")[2]
    sizes = BlockSizes(width // 2, d_state, d_conv, dt_rank, len(parameters))
    expected: Expected = {"parameters": (parameters, (sizes.directions, sizes.inner))}
    if width % 2:
        raise KernelError(f"xz has {width} channels, which are not two halves")
    lost = _Lost(gap, gap_delta, context, sources, read, cells, size, mass)
    lost = _check(xz, sizes, expected, lost, (), sizes.d_inner)
    if products is not None:
        shape = (sizes.directions, products_size(sizes.d_inner, d_state, dt_rank))
        if products.shape != shape or products.dtype != xz.dtype or products.device != xz.device:
            raise KernelError(f"products must be {xz.dtype} of shape {shape} on {xz.device}")
    refuse_gradients(xz, parameters)
    result: Tensor = torch.ops.ssmprune.mamba_inner(xz, parameters, d_state, d_conv, dt_rank, *lost, scale, products)
    return result


def inner_composed(xz: Tensor, parameters: Tensor, d_state: int, d_conv: int, dt_rank: int, **lost: Any) -> str | None:
    """Why `mamba_inner` computes these arguments op by op on a backend that `fuses`; None if it does not."""
    absent: dict[str, Any] = dict.fromkeys(_Lost._fields) | {"scale": 1.0}
    inputs = InnerInputs(xz, parameters, d_state, d_conv, dt_rank, **(absent | lost))
    return pick(xz, max(d_state, d_conv)).inner_composed(inputs)


def mamba_blocks(
    hidden: Tensor,
    residual: Tensor | None,
    parameters: Tensor,
    sizes: BlockSizes,
    *,
    gap: Tensor | None = None,
    gap_delta: Tensor | None = None,
    context: Tensor | None = None,
    sources: Tensor | None = None,
    read: Tensor | None = None,
    cells: Tensor | None = None,
    size: Tensor | None = None,
    mass: Tensor | None = None,
    scale: float = 1.0,
    eps: float = 1e-5,
    wants_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several Mamba blocks, one after the other: of each `add_rms_norm`, in_proj, `mamba_inner` and out_proj.

    hidden, residual  (B, L, d), the residual in float32 at least; none before the first block
    parameters        (blocks, n), of each block from `pack_block`
    gap, gap_delta    (G, B, S), (blocks, G, E), as in `selective_scan`
    context           (B, M, d): tokens that are not updated, divided by their root mean square
    mass              (blocks,)
    sources, read, cells, size  as in `mamba_inner`

    Returns hidden state and residual stream after the last block, (B, L, d) each, and y (B, L, E), the sum of the last
    block's scan outputs before the gate; (B, L, 0) unless `wants_y`. Has no gradient. Raises KernelError for what does
    not fit.
    """
    batch, length, dim = three(hidden, "hidden")
    if sizes.parts not in _PARTS.get(hidden.dtype, (0,)):
        raise KernelError(f"weights in {sizes.parts} parts are not for {hidden.dtype}")
    blocks = len(parameters)
    expected: Expected = {"parameters": (parameters, (blocks, sizes.block(dim)))}
    if residual is not None:
        expected["residual"] = (residual, (batch, length, dim))
    if not blocks or hidden.dtype == torch.float16:
        raise KernelError(f"there are {blocks} blocks, in {hidden.dtype}: one is needed, and no float16")
    lost = _check(
        hidden, sizes, expected, _Lost(gap, gap_delta, context, sources, read, cells, size, mass), (blocks,), dim
    )
    refuse_gradients(hidden, parameters)
    found = torch.ops.ssmprune.mamba_blocks(hidden, residual, parameters, list(sizes), *lost, scale, eps, wants_y)
    out, stream, y = found
    return out, stream, y


class _Lost(NamedTuple):
    """What pruned tokens leave behind, as the ops take it."""

    gap: Tensor | None
    gap_delta: Tensor | None
    context: Tensor | None
    sources: Tensor | None
    read: Tensor | None
    cells: Tensor | None
    size: Tensor | None
    mass: Tensor | None


def _check(
    tokens: Tensor, sizes: BlockSizes, expected: Expected, lost: _Lost, blocks: tuple[int, ...], context_width: int
) -> _Lost:
    """Raise KernelError for what does not fit. Returns counts of tokens in a precision that holds them."""
    batch, length = tokens.shape[:2]
    wide = torch.promote_types(tokens.dtype, torch.float32)
    _check_tokens(lost, sizes, batch, length)
    convolved, steps = tokens_and_steps(length, None if lost.sources is None else lost.sources.shape, lost.cells)
    counts = {name: value for name in ("gap", "size", "mass") if (value := getattr(lost, name)) is not None}
    lost = lost._replace(**{name: value.to(wide) for name, value in counts.items()})
    shapes = {"gap": (sizes.directions, batch, steps), "size": (batch, steps), "mass": blocks}
    shapes["gap_delta"] = (*blocks, sizes.directions, sizes.d_inner)
    expected |= {name: (value, shape) for name, shape in shapes.items() if (value := getattr(lost, name)) is not None}
    activations: Expected = {}
    if lost.context is not None:
        activations["context"] = (lost.context, (batch, lost.context.shape[1], context_width))
    check(tokens, activations, expected)
    for name, (tensor, _) in expected.items():
        if name != "gap_delta" and tensor.dtype != wide:
            raise KernelError(f"{name} must be {wide}, not {tensor.dtype}")
    if lost.context is not None and not length <= convolved <= length + lost.context.shape[1]:
        raise KernelError(f"sources are of {convolved} tokens, of {length} and a context of {lost.context.shape[1]}")
    return lost


def _check_tokens(lost: _Lost, sizes: BlockSizes, batch: int, length: int) -> None:
    """What goes together, and what names tokens."""
    if sizes.directions not in (1, 2):
        raise KernelError(f"there are {sizes.directions} directions")
    if lost.gap_delta is not None and lost.gap is None:
        raise KernelError("gap_delta needs gap")
    if (lost.context is None) != (lost.sources is None):
        raise KernelError("context and sources go together")
    if (lost.size is None) != (lost.mass is None):
        raise KernelError("size and mass go together")
    if lost.cells is not None and (lost.read is None or lost.size is None):
        raise KernelError("cells need read and size")
    if lost.read is not None and lost.sources is None:
        raise KernelError("read needs sources")
    convolved = length if lost.read is None or lost.sources is None else lost.sources.shape[2]
    shapes: dict[str, tuple[int, ...]] = {"sources": (sizes.directions, batch, convolved, sizes.d_conv)}
    shapes |= {"read": (batch, length), "cells": (batch, length)}
    for name, shape in shapes.items():
        value = getattr(lost, name)
        if value is not None and (value.shape != shape or value.dtype != torch.int64):
            raise KernelError(f"{name} must be int64 of shape {shape}")


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
    read: Tensor | None,
    cells: Tensor | None,
    size: Tensor | None,
    mass: Tensor | None,
    scale: float,
    products: Tensor | None = None,
) -> Tensor:
    lost = (gap, gap_delta, context, sources, read, cells, size, mass)
    inputs = InnerInputs(xz, parameters, d_state, d_conv, dt_rank, *lost, scale, products)
    return pick(xz, max(d_state, d_conv)).mamba_inner(inputs)


def _inner_fake(xz: Tensor, *others: Any) -> Tensor:
    return xz.new_empty(xz.shape[0], xz.shape[1], xz.shape[2] // 2)


def _blocks(
    hidden: Tensor,
    residual: Tensor | None,
    parameters: Tensor,
    sizes: Sequence[int],
    gap: Tensor | None,
    gap_delta: Tensor | None,
    context: Tensor | None,
    sources: Tensor | None,
    read: Tensor | None,
    cells: Tensor | None,
    size: Tensor | None,
    mass: Tensor | None,
    scale: float,
    eps: float,
    wants_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    *_, parts, eight_bits = sizes
    if eight_bits not in (0, 1, 2) or (parts and eight_bits):
        raise KernelError(f"eight_bits is {eight_bits}, with {parts} parts: it is 0, 1 or 2, and without parts")
    lost = (gap, gap_delta, context, sources, read, cells, size, mass)
    inputs = BlocksInputs(hidden, residual, parameters, sizes, *lost, scale, eps, wants_y)
    return pick(hidden, max(sizes[1], sizes[2])).mamba_blocks(inputs)


def _blocks_fake(
    hidden: Tensor, residual: Tensor | None, parameters: Any, sizes: Sequence[int], *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = hidden.new_empty(*hidden.shape[:2], sizes[0] if others[-1] else 0)
    stream = hidden.new_empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return hidden.new_empty(hidden.shape), stream, y


define("mamba_inner", _inner, _inner_fake)
define("mamba_blocks", _blocks, _blocks_fake)


def _inner_flops(
    batch: int, length: int, sizes: BlockSizes, sources: Sequence[int] | None, cells: Any, *, aligned: bool
) -> int:
    """Multiply-adds of the inside of a block, all directions."""
    tokens, steps = tokens_and_steps(length, sources, cells)
    convolution = conv_flops(batch, tokens, sizes.d_inner, sizes.d_conv)
    projections = batch * steps * sizes.d_inner * 2 * (sizes.dt_rank + sizes.d_state)
    has_D = cells is None
    scan = scan_flops(batch, steps, sizes.d_inner, sizes.d_state, has_D=has_D, aligned=aligned, read=length)
    return sizes.directions * (convolution + projections + scan)


@counted("mamba_inner")
def _(
    xz: Any,
    parameters: Any,
    d_state: int,
    d_conv: int,
    dt_rank: int,
    gap: Any,
    gap_delta: Any,
    context: Any,
    sources: Any,
    read: Any,
    cells: Any,
    size: Any,
    *_: Any,
    **__: Any,
) -> int:
    sizes = BlockSizes(xz[2] // 2, d_state, d_conv, dt_rank, parameters[0])
    aligned = gap is not None or size is not None
    return _inner_flops(xz[0], xz[1], sizes, sources, cells, aligned=aligned)


@counted("mamba_blocks")
def _(
    hidden: Any,
    residual: Any,
    parameters: Any,
    sizes: Any,
    gap: Any,
    gap_delta: Any,
    context: Any,
    sources: Any,
    read: Any,
    cells: Any,
    size: Any,
    *_: Any,
    **__: Any,
) -> int:
    batch, length, dim = hidden
    seen = 0 if context is None else context[1]
    projections = batch * (3 * length + seen) * dim * sizes[0]
    aligned = gap is not None or size is not None
    inner = _inner_flops(batch, length, BlockSizes(*sizes), sources, cells, aligned=aligned)
    return int(parameters[0] * (projections + inner))
