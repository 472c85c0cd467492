"""Backend `cpu`: the C kernels of csrc/, called through ctypes. float32 and bfloat16 on CPUs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import Backend
from ssmprune_cli.kernels.cpu.build import load_library
from ssmprune_cli.kernels.cpu.call import Blocks, Call, Conv, Gate, Inner, Linear, Norm, NormBack, Routed, Scan
from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    Gradients,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    RoutedInputs,
    ScanInputs,
)
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes
from ssmprune_cli.kernels.pytorch import eager

MAX_INNER = 64  # states or taps, as in csrc/vectors.h
MOST_YS = 4  # terms of a gated sum, as in csrc/rows.c
CHUNK = 16  # tokens between two states that are kept, as in csrc/scan.h
_DTYPES = (torch.float32, torch.bfloat16)
# Values; a pass over fewer is done before a second thread has started. Exponentials take ten times as long as sums.
_WORTH_THREADS = 1 << 16
_EXPONENTIALS_WORTH_THREADS = 1 << 13
_VECTOR, _TILE = 16, 32  # what widths are multiples of in csrc/blocks.c, the latter for weights in tiles
_PRODUCTS_WORTH_TILES = 1 << 26  # multiply-adds; PyTorch starts its linear layers sooner
SOURCE_OUTSIDE = "a source lies outside the tokens and their context"


def _threads(values: int, worth: int) -> int:
    return torch.get_num_threads() if values > worth else 1


def _position(inputs: GridConvInputs) -> str:
    return f"a position lies outside the grid of {inputs.rows} x {inputs.columns}"


def channel_groups(batch: int) -> int:
    """Groups of channels that a scan of `batch` samples is cut into: as few as give every thread the same work."""
    threads = torch.get_num_threads()
    return threads // math.gcd(batch, threads)


class CpuBackend(Backend):
    """Compiles its library when it is first asked for, unless one came with the installation."""

    name = "cpu"
    skips_reading = True
    fuses = True

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None

    def missing(self) -> str | None:
        if self._library is None and self._reason is None:
            try:
                self._library = load_library()
            except OSError as error:
                self._reason = str(error)
        return self._reason

    def has_tiles(self) -> bool:
        """Whether the processor multiplies matrices of bfloat16 by itself."""
        return self.missing() is None and self._library is not None and bool(self._library.tiles_available())

    def run(self, name: str, struct: ctypes.Structure, outside: str = "") -> None:
        """Raises KernelError when memory ran out, or for an index that the kernel refuses: `outside` says which."""
        if self._library is None:
            raise KernelError(f"kernel backend 'cpu' cannot be used: {self._reason}", hint="See `ssmprune env`.")
        status = int(getattr(self._library, name)(ctypes.byref(struct)))
        if status & 1:
            raise KernelError(f"memory ran out in {name}", hint="Use a smaller batch.")
        if status & 2:
            raise KernelError(outside)

    def accepts(self, example: Tensor, inner: int) -> bool:
        return example.dtype in _DTYPES and example.device.type == "cpu" and inner <= MAX_INNER

    def kept_states(self, length: int) -> int:
        return (length + CHUNK - 1) // CHUNK

    def scan_keeping(self, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
        batch, length, channels = inputs.u.shape
        states = torch.empty(batch, self.kept_states(length), inputs.A.shape[1], channels)
        return self.scan(inputs, states), states

    def scan(self, inputs: ScanInputs, states: Tensor | None = None) -> Tensor:
        """`states`, if given, is filled with what `scan_keeping` keeps."""
        batch, length, channels = inputs.u.shape
        outputs = length if inputs.read is None else inputs.read.shape[1]
        y = torch.empty(batch, outputs, channels, dtype=inputs.u.dtype)
        call = Call(threads=torch.get_num_threads(), groups=channel_groups(batch), outputs=outputs)
        call.scan(inputs)
        call.set(y=y)
        if states is not None:
            call.set(states=states)
        if inputs.read is not None:
            places = torch.arange(outputs).expand(batch, -1)
            call.set(slots=torch.full((batch, length), -1).scatter_(1, inputs.read, places))
        self.run("scan_forward", call.struct(Scan))
        return y

    def scan_backward(self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None) -> Gradients:
        batch, length, channels = inputs.u.shape
        if states is None or states.shape[1] != self.kept_states(length):  # another backend went forward
            _, states = self.scan_keeping(inputs)
        dtype, state, groups = inputs.u.dtype, inputs.A.shape[1], channel_groups(batch)
        wide, per_sample = (batch, length, channels), (batch, channels)
        found = {name: torch.empty(wide, dtype=dtype) for name in ("du", "ddelta")}
        if inputs.z is not None:
            found["dz"] = torch.empty(wide, dtype=dtype)
        if inputs.shift is not None:
            found["dshift"] = torch.empty(wide, dtype=dtype)
        found["dA"] = torch.empty(batch, channels, state)
        found.update({name: torch.empty(per_sample) for name in ("dD", "dbias", "dgap_delta")})
        found.update({name: torch.empty(batch, groups, length, state) for name in ("dB", "dC")})
        call = Call(threads=torch.get_num_threads(), groups=groups)
        call.scan(inputs)
        call.set(grad=grad.contiguous(), states=states, **found)
        self.run("scan_backward", call.struct(Scan))

        def total(name: str, like: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if like is None else found[name].sum(dim=dim).to(like.dtype)

        return (
            found["du"],
            found["ddelta"],
            total("dA", inputs.A),
            total("dB", inputs.B, dim=1),
            total("dC", inputs.C, dim=1),
            total("dD", inputs.D),
            found.get("dz"),
            total("dbias", inputs.delta_bias),
            found.get("dshift"),
            total("dgap_delta", inputs.gap_delta),
        )

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        call = Call(threads=_threads(x.numel(), _EXPONENTIALS_WORTH_THREADS), reverse=reverse)
        call.convolution(x, weight, bias)
        call.set(y=y)
        self.run("conv_forward", call.struct(Conv))
        return y

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, channels = x.shape
        d_x = torch.empty(x.shape, dtype=x.dtype)
        d_taps, d_bias = torch.empty(batch, weight.shape[1], channels), torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads(), reverse=reverse)
        call.convolution(x, weight, bias)
        call.set(grad=grad.contiguous(), dx=d_x, dtaps=d_taps, dbias=d_bias)
        self.run("conv_backward", call.struct(Conv))
        return d_x, d_taps.sum(dim=0).t().to(weight.dtype), d_bias.sum(dim=0).to(bias.dtype)

    def sparse_conv(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        call = Call(threads=_threads(x.numel(), _EXPONENTIALS_WORTH_THREADS), others=context.shape[1])
        call.convolution(x, weight, bias)
        call.rows(context=context)
        call.set(y=y, positions=sources.contiguous())
        self.run("sparse_conv_forward", call.struct(Conv), outside=SOURCE_OUTSIDE)
        return y

    def sparse_conv_backward(
        self, grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, _, channels = x.shape
        d_x, d_context = torch.empty(x.shape, dtype=x.dtype), torch.empty(context.shape, dtype=x.dtype)
        d_taps, d_bias = torch.empty(batch, weight.shape[1], channels), torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads(), others=context.shape[1])
        call.convolution(x, weight, bias)
        call.rows(context=context)
        call.set(grad=grad.contiguous(), positions=sources.contiguous())
        call.set(dx=d_x, dcontext=d_context, dtaps=d_taps, dbias=d_bias)
        self.run("sparse_conv_backward", call.struct(Conv), outside=SOURCE_OUTSIDE)
        return d_x, d_context, d_taps.sum(dim=0).t().to(weight.dtype), d_bias.sum(dim=0).to(bias.dtype)

    def grid_conv(self, inputs: GridConvInputs) -> Tensor:
        x = inputs.x
        y = torch.empty(x.shape[0], inputs.outputs, x.shape[2], dtype=x.dtype)
        call = Call(threads=torch.get_num_threads())
        call.grid_convolution(inputs)
        call.set(y=y)
        self.run("grid_conv_forward", call.struct(Conv), outside=_position(inputs))
        return y

    def grid_conv_backward(self, grad: Tensor, inputs: GridConvInputs) -> tuple[Tensor, ...]:
        x, weight, bias = inputs[:3]
        batch, _, channels = x.shape
        d_x, d_taps = torch.empty(x.shape, dtype=x.dtype), torch.empty(batch, weight[0].numel(), channels)
        d_bias = torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads())
        call.grid_convolution(inputs)
        call.set(grad=grad.contiguous(), dx=d_x, dtaps=d_taps, dbias=d_bias)
        self.run("grid_conv_backward", call.struct(Conv), outside=_position(inputs))
        d_weight = d_taps.sum(dim=0).t().view(weight.shape).to(weight.dtype)
        return (d_x, d_weight) if bias is None else (d_x, d_weight, d_bias.sum(dim=0).to(bias.dtype))

    def add_rms_norm(
        self, hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if weight.dtype not in _DTYPES:
            return eager.add_rms_norm(hidden, residual, weight, eps)
        hidden = hidden.contiguous()
        stream, normed = torch.empty(hidden.shape), torch.empty(hidden.shape, dtype=weight.dtype)
        call = Call(
            rows=hidden.shape[0] * hidden.shape[1],
            channels=hidden.shape[2],
            half_in=hidden.dtype == torch.bfloat16,
            half_out=weight.dtype == torch.bfloat16,
            threads=_threads(hidden.numel(), _WORTH_THREADS),
            eps=eps,
        )
        call.set(hidden=hidden, weight=weight.contiguous(), stream=stream, normed=normed)
        if residual is not None:
            call.set(residual=residual.contiguous())
        self.run("add_rms_norm", call.struct(Norm))
        return normed, stream

    def add_rms_norm_backward(
        self, d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if weight.dtype not in _DTYPES:
            return eager.add_rms_norm_gradients(d_normed, d_stream, stream, weight, eps)
        threads = _threads(stream.numel(), _WORTH_THREADS)
        rows, channels = stream.shape[0] * stream.shape[1], stream.shape[2]
        half = weight.dtype == torch.bfloat16
        d_sum, d_weight = torch.empty(stream.shape), torch.empty(threads, channels)
        call = Call(rows=rows, channels=channels, half=half, threads=threads, groups=threads, eps=eps)
        call.set(normed=d_normed.contiguous(), weight=weight.contiguous(), d_stream=d_stream.contiguous())
        call.set(stream=stream.contiguous(), d_sum=d_sum, d_weight=d_weight)
        self.run("add_rms_norm_backward", call.struct(NormBack))
        return d_sum, d_weight.sum(dim=0).to(weight.dtype)

    def gated_sum(self, ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
        if len(ys) > MOST_YS:
            return eager.gated_sum(ys, z, scale)
        out = torch.empty(z.shape, dtype=z.dtype)
        call = Call(scale=scale)
        call.gate(ys, z)
        call.set(out=out)
        call.numbers["threads"] = _threads(z.numel(), _EXPONENTIALS_WORTH_THREADS)
        self.run("gated_sum", call.struct(Gate))
        return out

    def gated_sum_backward(self, grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if len(ys) > MOST_YS:
            return eager.gated_sum_gradients(grad, ys, z, scale)
        d_y, d_z = torch.empty(z.shape, dtype=z.dtype), torch.empty(z.shape, dtype=z.dtype)
        call = Call(scale=scale)
        call.gate(ys, z)
        call.set(grad=grad.contiguous(), dy=d_y, dz=d_z)
        call.numbers["threads"] = _threads(z.numel(), _EXPONENTIALS_WORTH_THREADS)
        self.run("gated_sum_backward", call.struct(Gate))
        return d_y, d_z

    # The fused ops, for inference.

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


CPU = CpuBackend()
