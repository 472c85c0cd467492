"""Launches `inner_inputs` and `inner_scan`: the inside of a Mamba block in two kernels; imports Triton when it does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmprune_cli.kernels.inputs import InnerInputs, tokens_and_steps
from ssmprune_cli.kernels.packing import BlockSizes, unpack_inner
from ssmprune_cli.kernels.products import pack_products, padded

MAX_RANK = 64  # of the step: a program keeps its sums in registers
BLOCK_T = 32  # tokens of a tile
STAGES = 4  # tokens that a scan reads ahead


def refused(inputs: InnerInputs, *, interpreted: bool) -> str | None:
    """What the two kernels do not compute; None if they do."""
    if interpreted and inputs.xz.dtype == torch.bfloat16:
        return "Triton's interpreter takes the bits of bfloat16 for numbers when it multiplies matrices"
    if inputs.cells is not None:
        return "tokens are pooled in cells"
    if inputs.dt_rank > MAX_RANK:
        return f"the step has a rank of {inputs.dt_rank}, above {MAX_RANK}"
    if steps_of(inputs) * inputs.xz.shape[2] >= 2**31:
        return "a sequence has more values than 32 bits count"
    return None


def steps_of(inputs: InnerInputs) -> int:
    """Steps of a scan: all tokens that are convolved."""
    sources = None if inputs.sources is None else inputs.sources.shape
    return tokens_and_steps(inputs.xz.shape[1], sources, inputs.cells)[1]


class Tile(NamedTuple):
    """Channels and states of a program of the scan, which has one warp."""

    block_e: int
    block_n: int

    def programs(self, inputs: InnerInputs) -> int:
        return len(inputs.xz) * -(-inputs.channels // self.block_e)


def mamba_inner(inputs: InnerInputs, tile: Tile) -> Tensor:
    """See `ops.blocks.mamba_inner`; for what is not `refused`."""
    from ssmprune_cli.kernels.triton.inner_inputs import inner_inputs
    from ssmprune_cli.kernels.triton.inner_scan import inner_scan

    xz = inputs.xz if inputs.xz.stride(2) == 1 else inputs.xz.contiguous()
    (batch, length, width), N = xz.shape, inputs.d_state
    channels, directions = width // 2, len(inputs.parameters)
    sources, context = (None if each is None else each.contiguous() for each in (inputs.sources, inputs.context))
    tokens = steps_of(inputs)
    parameters, products = inputs.parameters.contiguous(), _products(inputs).contiguous()
    out = torch.empty(batch, length, channels, dtype=xz.dtype, device=xz.device)
    if not out.numel():
        return out
    u, delta = (xz.new_empty(directions, batch, tokens, channels) for _ in range(2))
    both = xz.new_empty(directions, batch, tokens, 2 * N, dtype=torch.float32)
    rows = None if inputs.read is None else torch.empty(batch, tokens, dtype=torch.int32, device=xz.device)
    sizes = BlockSizes(channels, N, inputs.d_conv, inputs.dt_rank, directions)
    rates_at = channels * (sizes.d_conv + sizes.projected + sizes.dt_rank)  # of A; behind it are three vectors
    gap, gap_delta, size = (
        None if each is None else each.contiguous() for each in (inputs.gap, inputs.gap_delta, inputs.size)
    )
    with torch.cuda.device_of(xz):
        inner_inputs[(-(-tokens // BLOCK_T), batch, directions)](
            xz,
            xz if context is None else context,
            xz if sources is None else sources,
            xz if inputs.read is None else inputs.read.contiguous(),
            parameters,
            products,
            u,
            delta,
            both,
            xz if rows is None else rows,
            *xz.stride()[:2],
            *(xz if context is None else context).stride()[:2],
            parameters.stride(0),
            products.stride(0),
            rates_at + channels * N,
            tokens,
            length,
            0 if context is None else context.shape[1],
            channels,
            2 * N,
            WIDTH=inputs.d_conv,
            HAS_SOURCES=sources is not None,
            HAS_READ=rows is not None,
            BLOCK_R=padded(inputs.dt_rank),
            BLOCK_C=padded(2 * N),
            **tile_of_inputs(xz.dtype),
        )
        inner_scan[(-(-channels // tile.block_e), batch)](
            u,
            delta,
            both,
            xz[..., channels:],
            parameters,
            xz if gap is None else gap,
            xz if gap_delta is None else gap_delta,
            xz if size is None else size,
            xz if inputs.mass is None else inputs.mass,
            xz if rows is None else rows,
            out,
            *xz.stride()[:2],
            parameters.stride(0),
            rates_at,
            tokens,
            length,
            channels,
            N,
            inputs.scale,
            MODE=_mode(inputs),
            GAP=gap is not None,
            HAS_SIZE=size is not None,
            HAS_READ=rows is not None,
            TWO=directions == 2,
            STAGES=STAGES,
            BLOCK_E=tile.block_e,
            BLOCK_N=tile.block_n,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return out


def _products(inputs: InnerInputs) -> Tensor:
    """The weights of the products; made now if the caller has not made them once and for all."""
    if inputs.products is not None:
        return inputs.products
    sizes = BlockSizes(inputs.channels, inputs.d_state, inputs.d_conv, inputs.dt_rank, len(inputs.parameters))
    return pack_products([unpack_inner(packed, sizes) for packed in inputs.parameters], inputs.xz.dtype)


def _mode(inputs: InnerInputs) -> int:
    """MODE of `inner_scan`: growing sizes are a gap where there is none."""
    if inputs.gap is None and inputs.size is None:
        return 0
    return 2 if inputs.gap_delta is None else 3


def tile_of_inputs(dtype: torch.dtype) -> dict[str, Any]:
    """So many channels at a time as leave the sums in registers: see test_triton_compiles.py."""
    single = dtype == torch.float32
    exact = single and not torch.backends.cuda.matmul.allow_tf32  # as PyTorch's own products are
    return {
        "PRECISION": "ieee" if exact else "tf32",
        "BLOCK_T": BLOCK_T,
        "BLOCK_E": 32 if single else 64,
        "num_warps": 4,
        "num_stages": 2,
        "enable_fp_fusion": True,
    }
