"""The fused ops of backend `cpu`: for inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ssmprune_cli.kernels.cpu_call import Blocks, Call, Inner, Linear, Routed
from ssmprune_cli.kernels.cpu_library import SOURCE_OUTSIDE, LibraryBackend, channel_groups
from ssmprune_cli.kernels.inputs import BlocksInputs, InnerInputs, LinearInputs, RoutedInputs
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes

_VECTOR, _TILE = 16, 32  # what widths are multiples of in csrc/blocks.c, the latter for weights in tiles
_PRODUCTS_WORTH_TILES = 1 << 26  # multiply-adds; PyTorch starts its linear layers sooner


class FusedBackend(LibraryBackend):
    """What the C kernels do in one call where models call many small ops."""

    fuses = True

    def mamba_inner(self, inputs: InnerInputs) -> Tensor:
        batch, length, channels = inputs.xz.shape
        y = torch.empty(batch, length, channels // 2, dtype=inputs.xz.dtype)
        call = Call(threads=torch.get_num_threads())
        call.inner(inputs)
        call.set(y=y)
        self.run("mamba_inner", call.struct(Inner), outside=SOURCE_OUTSIDE)
        return y

    def block_parts(self, dim: int, d_inner: int, dtype: torch.dtype) -> int | None:
        together = math.gcd(dim, d_inner)
        if dtype == torch.bfloat16:
            return None if together % _TILE else 1
        if together % _VECTOR:
            return None
        return 0 if together % _TILE or not self.has_tiles() else FLOAT_PARTS

    def mamba_blocks(self, inputs: BlocksInputs) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, dim = inputs.hidden.shape
        dtype, sizes = inputs.hidden.dtype, BlockSizes(*inputs.sizes)
        fits = math.gcd(dim, sizes.d_inner) % (_TILE if sizes.parts else _VECTOR) == 0
        if not fits or (sizes.parts == FLOAT_PARTS and not self.has_tiles()):
            return super().mamba_blocks(inputs)
        out, stream = torch.empty(inputs.hidden.shape), torch.empty(inputs.hidden.shape)
        y = torch.empty(batch, length, sizes.d_inner if inputs.wants_y else 0)
        call = Call(threads=torch.get_num_threads())
        call.blocks(inputs)
        call.set(out=out, stream=stream)
        if inputs.wants_y:
            call.set(ungated=y)
        self.run("mamba_blocks", call.struct(Blocks), outside=SOURCE_OUTSIDE)
        return out.to(dtype), stream, y.to(dtype)

    def routed_scans(self, inputs: RoutedInputs) -> Tensor:
        y = torch.empty(inputs.u.shape)
        call = Call(threads=torch.get_num_threads(), groups=channel_groups(len(y)))
        call.routed(inputs)
        call.set(y=y)
        self.run("routed_scans", call.struct(Routed), outside="a route visits a token that is not there")
        return y.to(inputs.u.dtype)

    def suits_linear(self, rows: int, inputs: int, outputs: int) -> bool:
        worth = rows * inputs * outputs > _PRODUCTS_WORTH_TILES
        return worth and self._tiles_take(inputs, outputs)

    def linear(self, inputs: LinearInputs) -> Tensor:
        x = inputs.x
        if not self._tiles_take(x.shape[-1], inputs.outputs):
            return super().linear(inputs)
        out = torch.empty(*x.shape[:-1], inputs.outputs)
        call = Call(threads=torch.get_num_threads())
        call.linear(inputs)
        call.set(out=out)
        self.run("linear", call.struct(Linear))
        return out

    def _tiles_take(self, inputs: int, outputs: int) -> bool:
        return math.gcd(inputs, outputs) % _TILE == 0 and self.has_tiles()
