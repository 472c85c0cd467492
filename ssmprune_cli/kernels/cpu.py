"""Backend `cpu`: the C kernels of csrc/, called through ctypes. float32 and bfloat16 on CPUs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmprune_cli.kernels import eager
from ssmprune_cli.kernels.backend import Gradients
from ssmprune_cli.kernels.cpu_call import Call, Conv, Gate, Norm, NormBack, Scan
from ssmprune_cli.kernels.cpu_fused import FusedBackend
from ssmprune_cli.kernels.cpu_library import SOURCE_OUTSIDE, channel_groups
from ssmprune_cli.kernels.inputs import GridConvInputs, ScanInputs

MAX_INNER = 64  # states or taps, as in csrc/vectors.h
MOST_YS = 4  # terms of a gated sum, as in csrc/rows.c
CHUNK = 16  # tokens between two states that are kept, as in csrc/scan.h
_DTYPES = (torch.float32, torch.bfloat16)
# Values; a pass over fewer is done before a second thread has started. Exponentials take ten times as long as sums.
_WORTH_THREADS = 1 << 16
_EXPONENTIALS_WORTH_THREADS = 1 << 13


def _threads(values: int, worth: int) -> int:
    return torch.get_num_threads() if values > worth else 1


def _position(inputs: GridConvInputs) -> str:
    return f"a position lies outside the grid of {inputs.rows} x {inputs.columns}"


class CpuBackend(FusedBackend):
    """All kernels; those of the fused ops come from FusedBackend."""

    name = "cpu"
    skips_reading = True

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


CPU = CpuBackend()
