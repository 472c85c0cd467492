"""The public ops `mamba_inner` and `mamba_blocks`: what many small ops would do of Mamba blocks, in one; for inference.

Glossary: as in inputs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import BlocksInputs, InnerInputs
from ssmprune_cli.kernels.ops.conv import conv_flops
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, refuse_gradients, three
from ssmprune_cli.kernels.ops.scan import scan_flops
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes

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
    width = three(xz, "xz")[2]
    sizes = BlockSizes(width // 2, d_state, d_conv, dt_rank, len(parameters))
    expected: Expected = {"parameters": (parameters, (sizes.directions, sizes.inner))}
    if gap_delta is not None:
        expected["gap_delta"] = (gap_delta, (sizes.directions, sizes.d_inner))
    if width % 2:
        raise KernelError(f"xz has {width} channels, which are not two halves")
    gap = _check(xz, sizes, expected, gap, gap_delta, context, sizes.d_inner, sources)
    refuse_gradients(xz, parameters)
    given = (gap, gap_delta, context, sources)
    result: Tensor = torch.ops.ssmprune.mamba_inner(xz, parameters, d_state, d_conv, dt_rank, *given, scale)
    return result


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
    scale: float = 1.0,
    eps: float = 1e-5,
    wants_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Several Mamba blocks, one after the other: of each `add_rms_norm`, in_proj, `mamba_inner` and out_proj.

    hidden, residual  (B, L, d), the residual in float32 at least; none before the first block
    parameters        (blocks, n), of each block from `pack_block`
    gap, gap_delta    (G, B, L), (blocks, G, E), as in `selective_scan`
    context           (B, M, d): tokens that only convolutions see, divided by their root mean square
    sources           (G, B, L, K) int64, as in `sparse_conv1d`; both or none

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
    if gap_delta is not None:
        expected["gap_delta"] = (gap_delta, (blocks, sizes.directions, sizes.d_inner))
    if not blocks or hidden.dtype == torch.float16:
        raise KernelError(f"there are {blocks} blocks, in {hidden.dtype}: one is needed, and no float16")
    gap = _check(hidden, sizes, expected, gap, gap_delta, context, dim, sources)
    refuse_gradients(hidden, parameters)
    given = (gap, gap_delta, context, sources)
    found = torch.ops.ssmprune.mamba_blocks(hidden, residual, parameters, list(sizes), *given, scale, eps, wants_y)
    out, stream, y = found
    return out, stream, y


def _check(
    tokens: Tensor,
    sizes: BlockSizes,
    expected: Expected,
    gap: Tensor | None,
    gap_delta: Tensor | None,
    context: Tensor | None,
    context_width: int,
    sources: Tensor | None,
) -> Tensor | None:
    """Raise KernelError for what does not fit. Returns the gap in a precision that holds counts."""
    batch, length = tokens.shape[:2]
    if gap is not None:
        gap = gap.to(torch.promote_types(tokens.dtype, torch.float32))
        expected["gap"] = (gap, (sizes.directions, batch, length))
    activations: Expected = {}
    if context is not None:
        activations["context"] = (context, (batch, context.shape[1], context_width))
    check(tokens, activations, expected)
    wide = torch.promote_types(tokens.dtype, torch.float32)
    for name, (tensor, _) in expected.items():
        if name != "gap_delta" and tensor.dtype != wide:
            raise KernelError(f"{name} must be {wide}, not {tensor.dtype}")
    if sizes.directions not in (1, 2):
        raise KernelError(f"there are {sizes.directions} directions")
    if gap_delta is not None and gap is None:
        raise KernelError("gap_delta needs gap")
    if (context is None) != (sources is None):
        raise KernelError("context and sources go together")
    wanted = (sizes.directions, batch, length, sizes.d_conv)
    if sources is not None and (sources.shape != wanted or sources.dtype != torch.int64):
        raise KernelError(f"sources must be int64 of shape {wanted}")
    return gap


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
    scale: float,
    eps: float,
    wants_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = BlocksInputs(hidden, residual, parameters, sizes, gap, gap_delta, context, sources, scale, eps, wants_y)
    return pick(hidden, max(sizes[1], sizes[2])).mamba_blocks(inputs)


def _blocks_fake(
    hidden: Tensor, residual: Tensor | None, parameters: Any, sizes: Sequence[int], *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    y = hidden.new_empty(*hidden.shape[:2], sizes[0] if others[-1] else 0)
    stream = hidden.new_empty(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return hidden.new_empty(hidden.shape), stream, y


define("mamba_inner", _inner, _inner_fake)
define("mamba_blocks", _blocks, _blocks_fake)


def _inner_flops(batch: int, length: int, sizes: BlockSizes, *, aligned: bool) -> int:
    """Multiply-adds of the inside of a block, all directions."""
    convolution = conv_flops(batch, length, sizes.d_inner, sizes.d_conv)
    projections = batch * length * sizes.d_inner * 2 * (sizes.dt_rank + sizes.d_state)
    scan = scan_flops(batch, length, sizes.d_inner, sizes.d_state, has_D=True, aligned=aligned)
    return sizes.directions * (convolution + projections + scan)


@counted("mamba_inner")
def _(xz: Any, parameters: Any, d_state: int, d_conv: int, dt_rank: int, gap: Any, *_: Any, **__: Any) -> int:
    sizes = BlockSizes(xz[2] // 2, d_state, d_conv, dt_rank, parameters[0])
    return _inner_flops(xz[0], xz[1], sizes, aligned=gap is not None)


@counted("mamba_blocks")
def _(
    hidden: Any, residual: Any, parameters: Any, sizes: Any, gap: Any, gap_delta: Any, context: Any, *_: Any, **__: Any
) -> int:
    batch, length, dim = hidden
    seen = 0 if context is None else context[1]
    projections = batch * (3 * length + seen) * dim * sizes[0]
    inner = _inner_flops(batch, length, BlockSizes(*sizes), aligned=gap is not None)
    return int(parameters[0] * (projections + inner))
