"""Backend `cpu`: the C kernels of csrc/, called through ctypes. float32 and bfloat16 on CPUs."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import Backend
from ssmprune_cli.kernels.cpu.call import (
    MOST_YS,
    Blocks,
    Call,
    Conv,
    Gate,
    Inner,
    Linear,
    Move,
    Norm,
    NormBack,
    Order,
    Routed,
    Scan,
    Score,
    Sum,
    dense_rows,
    fits,
    slots_of,
)
from ssmprune_cli.kernels.cpu.library import Dots, Library
from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    Gradients,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    Moved,
    MoveInputs,
    OrderInputs,
    RoutedInputs,
    ScanInputs,
)
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes
from ssmprune_cli.kernels.pytorch import eager

MAX_INNER = 256  # states or taps, as in csrc/vectors.h
CHUNK = 16  # tokens between two states that are kept, as in csrc/scan.h
_DTYPES = (torch.float32, torch.bfloat16)
# Values; a pass over fewer is done before a second thread has started. Exponentials take ten times as long as sums.
_WORTH_THREADS = 1 << 16
_EXPONENTIALS_WORTH_THREADS = 1 << 13
# Sums over rows or channels are made of parts of so many, whatever the threads: they do not change a bit of them.
_ROWS_OF_SUM, _CHANNELS_OF_SUM = 64, 256
_TILE = 32  # inputs or outputs of a whole tile, as in csrc/tiles.h
_PRODUCTS_WORTH_TILES = 1 << 26  # multiply-adds; PyTorch starts its linear layers sooner
_KINDS = {"clip": 0, "mean": 1, "l1": 2, "l2": 3}  # of scores, as in csrc/prune.c
SOURCE_OUTSIDE = "a source lies outside the tokens and their context"
_FUSED_OUTSIDE = f"{SOURCE_OUTSIDE}, or a cell without the token that is read"


def _threads(values: int, worth: int) -> int:
    return torch.get_num_threads() if values > worth else 1


def _position(inputs: GridConvInputs) -> str:
    return f"a position lies outside the grid of {inputs.rows} x {inputs.columns}"


def channel_groups(batch: int) -> int:
    """Groups of channels that a scan of `batch` samples is cut into: as few as give every thread the same work."""
    threads = torch.get_num_threads()
    return threads // math.gcd(batch, threads)


class CpuBackend(Backend):
    """Calls the C code of `library`, which is made of `level` and `dots`."""

    name = "cpu"
    skips_reading = True
    fuses = True

    def __init__(self, level: str | None = None, *, dots: Dots | None = None) -> None:
        self.library = Library(level, dots=dots)

    def missing(self) -> str | None:
        return self.library.missing()

    def accepts(self, example: Tensor, inner: int) -> bool:
        fits = example.dtype in _DTYPES and example.device.type == "cpu" and inner <= MAX_INNER
        if fits:
            self.library.asked_level()  # a level that is asked for and cannot be is no reason to run something else
        return fits

    def kept_states(self, length: int) -> int:
        return (length + CHUNK - 1) // CHUNK

    def scan(self, inputs: ScanInputs) -> Tensor:
        return self._forward(inputs)

    def scan_with_states(self, inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        batch, length, channels = inputs.u.shape
        state = inputs.A.shape[1]
        last = torch.empty(batch, state, channels)
        states = torch.empty(batch, self.kept_states(length) if keep else 0, state, channels)
        y = self._forward(inputs, last=last, **({"states": states} if keep else {}))
        return y, last.transpose(1, 2).contiguous(), states

    def _forward(self, inputs: ScanInputs, **wanted: Tensor) -> Tensor:
        """y; of the other results those that are `wanted` are filled."""
        batch, length, channels = inputs.u.shape
        outputs = length if inputs.read is None else inputs.read.shape[1]
        y = torch.empty(batch, outputs, channels, dtype=inputs.u.dtype)
        call = Call(threads=torch.get_num_threads(), groups=channel_groups(batch), outputs=outputs)
        call.scan(inputs)
        call.set(y=y, **wanted)
        if inputs.read is not None:
            call.set(slots=slots_of(inputs.read, batch, length))
        self.library.run("scan_forward", call.struct(Scan))
        return y

    def scan_backward(
        self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None, d_last: Tensor | None = None
    ) -> Gradients:
        batch, length, channels = inputs.u.shape
        if states is None or states.shape[1] != self.kept_states(length):  # another backend went forward
            *_, states = self.scan_with_states(inputs, keep=True)
        dtype, state, groups = inputs.u.dtype, inputs.A.shape[1], -(-channels // _CHANNELS_OF_SUM) or 1
        wide, per_sample = (batch, length, channels), (batch, channels)
        found = {name: torch.empty(wide, dtype=dtype) for name in ("du", "ddelta")}
        if inputs.z is not None:
            found["dz"] = torch.empty(wide, dtype=dtype)
        if inputs.shift is not None:
            found["dshift"] = torch.empty(wide, dtype=dtype)
        if inputs.initial_state is not None:
            found["dinitial"] = torch.empty(batch, state, channels)
        found["dA"] = torch.empty(batch, channels, state)
        found.update({name: torch.empty(per_sample) for name in ("dD", "dbias", "dgap_delta")})
        found.update({name: torch.empty(batch, groups, length, state) for name in ("dB", "dC")})
        call = Call(threads=torch.get_num_threads(), groups=groups)
        call.scan(inputs)
        call.values("grad", grad, wide, dtype)
        call.state("dlast", d_last, (batch, channels, state))
        call.values("states", states, (batch, self.kept_states(length), state, channels), torch.float32)
        call.set(**found)
        self.library.run("scan_backward", call.struct(Scan))

        def total(name: str, like: Tensor | None, dim: int = 0) -> Tensor | None:
            return None if like is None else self._sum(found[name], dim).to(like.dtype)

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
            found["dinitial"].transpose(1, 2) if inputs.initial_state is not None else None,
        )

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        call = Call(threads=_threads(x.numel(), _EXPONENTIALS_WORTH_THREADS), reverse=reverse)
        call.convolution(x, weight, bias)
        call.set(y=y)
        self.library.run("conv_forward", call.struct(Conv))
        return y

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, channels = x.shape
        d_x = torch.empty(x.shape, dtype=x.dtype)
        d_taps, d_bias = torch.empty(batch, weight.shape[1], channels), torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads(), reverse=reverse)
        call.convolution(x, weight, bias)
        call.values("grad", grad, x.shape, x.dtype)
        call.set(dx=d_x, dtaps=d_taps, dbias=d_bias)
        self.library.run("conv_backward", call.struct(Conv))
        return d_x, self._sum(d_taps).t().to(weight.dtype), self._sum(d_bias).to(bias.dtype)

    def sparse_conv(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype)
        call = Call(threads=_threads(x.numel(), _EXPONENTIALS_WORTH_THREADS))
        call.sparse_convolution(x, context, sources, weight, bias)
        call.set(y=y)
        self.library.run("sparse_conv_forward", call.struct(Conv), outside=SOURCE_OUTSIDE)
        return y

    def sparse_conv_backward(
        self, grad: Tensor, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        batch, _, channels = x.shape
        d_x, d_context = torch.empty(x.shape, dtype=x.dtype), torch.empty(context.shape, dtype=x.dtype)
        d_taps, d_bias = torch.empty(batch, weight.shape[1], channels), torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads())
        call.sparse_convolution(x, context, sources, weight, bias)
        call.values("grad", grad, x.shape, x.dtype)
        call.set(dx=d_x, dcontext=d_context, dtaps=d_taps, dbias=d_bias)
        self.library.run("sparse_conv_backward", call.struct(Conv), outside=SOURCE_OUTSIDE)
        return d_x, d_context, self._sum(d_taps).t().to(weight.dtype), self._sum(d_bias).to(bias.dtype)

    def grid_conv(self, inputs: GridConvInputs) -> Tensor:
        x = inputs.x
        call = Call(threads=torch.get_num_threads())
        call.grid_convolution(inputs)
        y = torch.empty(x.shape[0], inputs.outputs, x.shape[2], dtype=x.dtype)
        call.set(y=y)
        self.library.run("grid_conv_forward", call.struct(Conv), outside=_position(inputs))
        return y

    def grid_conv_backward(self, grad: Tensor, inputs: GridConvInputs) -> tuple[Tensor, ...]:
        x, weight, bias = inputs[:3]
        batch, _, channels = x.shape
        d_x, d_taps = torch.empty(x.shape, dtype=x.dtype), torch.empty(batch, weight[0].numel(), channels)
        d_bias = torch.empty(batch, channels)
        call = Call(threads=torch.get_num_threads())
        call.grid_convolution(inputs)
        call.values("grad", grad, (batch, inputs.outputs, channels), x.dtype)
        call.set(dx=d_x, dtaps=d_taps, dbias=d_bias)
        self.library.run("grid_conv_backward", call.struct(Conv), outside=_position(inputs))
        d_weight = self._sum(d_taps).t().view(weight.shape).to(weight.dtype)
        return (d_x, d_weight) if bias is None else (d_x, d_weight, self._sum(d_bias).to(bias.dtype))

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
        call.values("hidden", hidden, hidden.shape, hidden.dtype)
        call.values("weight", weight, hidden.shape[2:], weight.dtype)
        call.values("residual", residual, hidden.shape, torch.float32)
        call.set(stream=stream, normed=normed)
        self.library.run("add_rms_norm", call.struct(Norm))
        return normed, stream

    def add_rms_norm_backward(
        self, d_normed: Tensor, d_stream: Tensor, stream: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        if weight.dtype not in _DTYPES:
            return eager.add_rms_norm_gradients(d_normed, d_stream, stream, weight, eps)
        rows, channels = stream.shape[0] * stream.shape[1], stream.shape[2]
        groups = -(-rows // _ROWS_OF_SUM) or 1
        half, threads = weight.dtype == torch.bfloat16, _threads(stream.numel(), _WORTH_THREADS)
        d_sum, d_weight = torch.empty(stream.shape), torch.empty(groups, channels)
        call = Call(rows=rows, channels=channels, half=half, threads=threads, groups=groups, eps=eps)
        call.values("normed", d_normed, stream.shape, weight.dtype)
        call.values("weight", weight, (channels,), weight.dtype)
        call.values("d_stream", d_stream, stream.shape, torch.float32)
        call.values("stream", stream, stream.shape, torch.float32)
        call.set(d_sum=d_sum, d_weight=d_weight)
        self.library.run("add_rms_norm_backward", call.struct(NormBack))
        return d_sum, self._sum(d_weight).to(weight.dtype)

    def _sum(self, parts: Tensor, dim: int = 0) -> Tensor:
        """The sum over the first dimension or the second. PyTorch's adds up in an order that depends on the threads."""
        outer, count, columns = math.prod(parts.shape[:dim]), parts.shape[dim], math.prod(parts.shape[dim + 1 :])
        total = torch.empty(*parts.shape[:dim], *parts.shape[dim + 1 :])
        call = Call(outer=outer, count=count, columns=columns, threads=_threads(parts.numel(), _WORTH_THREADS))
        call.set(x=parts, y=total)
        self.library.run("sum_parts", call.struct(Sum))
        return total

    def gated_sum(self, ys: Sequence[Tensor], z: Tensor, scale: float) -> Tensor:
        if not 0 < len(ys) <= MOST_YS:
            return eager.gated_sum(ys, z, scale)
        out = torch.empty(z.shape, dtype=z.dtype)
        call = Call(scale=scale)
        call.gate(ys, z)
        call.set(out=out)
        call.numbers["threads"] = _threads(z.numel(), _EXPONENTIALS_WORTH_THREADS)
        self.library.run("gated_sum", call.struct(Gate))
        return out

    def gated_sum_backward(self, grad: Tensor, ys: Sequence[Tensor], z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if not 0 < len(ys) <= MOST_YS:
            return eager.gated_sum_gradients(grad, ys, z, scale)
        d_y, d_z = torch.empty(z.shape, dtype=z.dtype), torch.empty(z.shape, dtype=z.dtype)
        call = Call(scale=scale)
        call.gate(ys, z)
        call.values("grad", grad, z.shape, z.dtype)
        call.set(dy=d_y, dz=d_z)
        call.numbers["threads"] = _threads(z.numel(), _EXPONENTIALS_WORTH_THREADS)
        self.library.run("gated_sum_backward", call.struct(Gate))
        return d_y, d_z

    # A prune point. A small batch feels each microsecond of it: structs are filled here, without a Call.

    def score_tokens(self, ys: Sequence[Tensor], kind: str) -> Tensor:
        shape = ys[0].shape
        if ys[0].dtype != torch.float32 or not ys[0].numel() or len(ys) > MOST_YS:
            return super().score_tokens(ys, kind)
        for y in ys:
            fits("ys", y, shape, torch.float32)
        dense = [y.contiguous() for y in ys]
        score = torch.empty(shape[:2])
        arguments = Score(
            score=score.data_ptr(),
            rows=score.numel(),
            channels=shape[2],
            count=len(dense),
            kind=_KINDS[kind],
            threads=_threads(dense[0].numel(), _WORTH_THREADS),
            **{f"y{number}": y.data_ptr() for number, y in enumerate(dense)},
        )
        self.library.run("score_tokens", arguments)
        return score

    def order_tokens(self, inputs: OrderInputs) -> Tensor:
        score, positions, live, protected, count, others = inputs
        batch, length = shape = score.shape
        fits("score", score, shape, score.dtype)
        fits("positions", positions, shape, torch.int64)
        if live is not None:
            fits("live", live, shape, torch.bool)
            live = live.contiguous()
        if not 0 <= count <= length:
            raise KernelError(f"{count} of {length} tokens cannot stay")
        score, positions = score.float().contiguous(), positions.contiguous()
        places = (ctypes.c_int64 * len(protected))(*protected)
        order = torch.empty(batch, length if others else count, dtype=torch.int64)
        arguments = Order(
            score=score.data_ptr(),
            positions=positions.data_ptr(),
            protected=ctypes.addressof(places),
            live=None if live is None else live.data_ptr(),
            order=order.data_ptr(),
            batch=batch,
            length=length,
            count=count,
            ordered=order.shape[1],
            protections=len(protected),
            threads=_threads(batch * length, _EXPONENTIALS_WORTH_THREADS),
        )
        self.library.run("order_tokens", arguments)
        return order

    def move_tokens(self, inputs: MoveInputs) -> Moved:
        hidden, residual, positions, order, count, older, older_positions = inputs
        exact = hidden.dtype == torch.float32 and (residual is None or residual.dtype == torch.float32)
        if not exact or not hidden.numel():
            return super().move_tokens(inputs)
        batch, length, channels = hidden.shape
        ordered = order.shape[1]
        fits("hidden", hidden, (batch, length, channels), torch.float32)
        fits("positions", positions, (batch, length), torch.int64)
        fits("order", order, (batch, ordered), torch.int64)
        if not 0 <= count <= ordered <= length:
            raise KernelError(f"{count} of {length} tokens cannot stay")
        hidden, positions, order = dense_rows(hidden), positions.contiguous(), order.contiguous()
        arguments = Move(
            hidden=hidden.data_ptr(),
            positions=positions.data_ptr(),
            order=order.data_ptr(),
            batch=batch,
            length=length,
            channels=channels,
            count=count,
            ordered=ordered,
            hidden_b=hidden.stride(0),
            hidden_l=hidden.stride(1),
        )
        left = ordered - count
        if older is not None and older_positions is not None:
            left += older.shape[1]
            fits("older", older, (batch, older.shape[1], channels), torch.float32)
            fits("older_positions", older_positions, older.shape[:2], torch.int64)
            older, older_positions = older.contiguous(), older_positions.contiguous()
            arguments.older, arguments.older_positions = older.data_ptr(), older_positions.data_ptr()
            arguments.others = older.shape[1]
        kept_hidden, gaps = torch.empty(batch, count, channels), torch.empty(2, batch, count)
        kept_positions = torch.empty(batch, count, dtype=torch.int64)
        dropped, places = torch.empty(batch, left, channels), torch.empty(batch, left, dtype=torch.int64)
        arguments.kept_hidden, arguments.kept_positions = kept_hidden.data_ptr(), kept_positions.data_ptr()
        arguments.gaps, arguments.dropped = gaps.data_ptr(), dropped.data_ptr()
        arguments.dropped_positions = places.data_ptr()
        kept_residual = torch.empty(0)
        if residual is not None:
            fits("residual", residual, (batch, length, channels), torch.float32)
            residual = dense_rows(residual)
            kept_residual = torch.empty(batch, count, channels)
            arguments.residual, arguments.kept_residual = residual.data_ptr(), kept_residual.data_ptr()
            arguments.residual_b, arguments.residual_l, _ = residual.stride()
        arguments.threads = _threads(batch * (count + left) * channels, _WORTH_THREADS)
        self.library.run("move_tokens", arguments, outside="order names a row that is not there")
        return Moved(kept_hidden, kept_residual, kept_positions, gaps, dropped, places)

    # The fused ops, for inference.

    def mamba_inner(self, inputs: InnerInputs) -> Tensor:
        call = Call(threads=torch.get_num_threads())
        call.inner(inputs)
        batch, length, channels = inputs.xz.shape
        y = torch.empty(batch, length, channels // 2, dtype=inputs.xz.dtype)
        call.set(y=y)
        self.library.run("mamba_inner", call.struct(Inner), outside=_FUSED_OUTSIDE)
        return y

    def block_parts(self, dim: int, d_inner: int, dtype: torch.dtype) -> int | None:
        if dtype == torch.bfloat16:
            return 1
        return FLOAT_PARTS if self.library.has_tiles() else 0

    def mamba_blocks(self, inputs: BlocksInputs) -> tuple[Tensor, Tensor, Tensor]:
        dtype, sizes = inputs.hidden.dtype, BlockSizes(*inputs.sizes)
        if sizes.parts == FLOAT_PARTS and not self.library.has_tiles():
            return super().mamba_blocks(inputs)
        call = Call(threads=torch.get_num_threads(), tiles=self.library.has_tiles(), dots=self.library.dots())
        call.blocks(inputs)
        batch, length, _ = inputs.hidden.shape
        out, stream = torch.empty(inputs.hidden.shape), torch.empty(inputs.hidden.shape)
        y = torch.empty(batch, length, sizes.d_inner if inputs.wants_y else 0)
        call.set(out=out, stream=stream)
        if inputs.wants_y:
            call.set(ungated=y)
        self.library.run("mamba_blocks", call.struct(Blocks), outside=_FUSED_OUTSIDE)
        return out.to(dtype), stream, y.to(dtype)

    def routed_scans(self, inputs: RoutedInputs) -> Tensor:
        call = Call(threads=torch.get_num_threads(), groups=channel_groups(len(inputs.u)))
        call.routed(inputs)
        y = torch.empty(inputs.u.shape)
        call.set(y=y)
        outside = "a route visits a token that is not there, or one twice"
        self.library.run("routed_scans", call.struct(Routed), outside=outside)
        return y.to(inputs.u.dtype)

    def suits_linear(self, rows: int, inputs: int, outputs: int) -> bool:
        whole = inputs % _TILE == 0 and outputs % _TILE == 0  # others are padded, which has not been shown to pay
        return whole and rows * inputs * outputs > _PRODUCTS_WORTH_TILES and self.library.has_tiles()

    def linear(self, inputs: LinearInputs) -> Tensor:
        x = inputs.x
        if not self.library.has_tiles():
            return super().linear(inputs)
        call = Call(threads=torch.get_num_threads())
        call.linear(inputs)
        out = torch.empty(*x.shape[:-1], inputs.outputs)
        call.set(out=out)
        self.library.run("linear", call.struct(Linear))
        return out

    def has_dots(self) -> bool:
        return self.library.dots() is not Dots.PAIRS

    def linear_int8(self, inputs: LinearInputs) -> Tensor:
        call = Call(threads=torch.get_num_threads(), dots=self.library.dots())
        call.linear(inputs, eight_bits=True)
        out = torch.empty(*inputs.x.shape[:-1], inputs.outputs)
        call.set(out=out)
        self.library.run("linear", call.struct(Linear))
        return out


CPU = CpuBackend()


def cpu_facts() -> dict[str, Any]:
    """What `ssmprune env` shows of the C kernels."""
    return CPU.library.facts()
