"""The arguments of one call of the C kernels in csrc/: its struct, filled from tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    RoutedInputs,
    ScanInputs,
)
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes


def _struct(name: str, pointers: str, numbers: str, real: str = "") -> type[ctypes.Structure]:
    kinds = ((pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (real, ctypes.c_double))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Names and order of the structs in csrc/.
Scan = _struct(
    "Scan",
    "u delta B C z shift grad y du ddelta dz dshift A D bias gap gap_delta dA dB dC dD dbias dgap_delta slots visits "
    "rank dt_weight sum ungated states",
    "batch length channels state u_b u_l delta_b delta_l B_b B_l C_b C_l z_b z_l shift_b shift_l gap_b gap_l A_c A_n "
    "softplus reverse half half_out threads groups outputs rank_l R",
    "scale",
)
Conv = _struct(
    "Conv",
    "x context grad y dx dcontext taps bias dtaps dbias positions",
    "batch length channels width x_b x_l context_b context_l others rows columns outputs reverse half threads",
)
Norm = _struct("Norm", "hidden residual weight stream normed", "rows channels half_in half_out threads", "eps")
NormBack = _struct(
    "NormBack", "normed weight stream d_stream d_sum d_weight", "rows channels half threads groups", "eps"
)
Gate = _struct("Gate", "y0 y1 y2 y3 z grad out dy dz", "batch length channels count z_b z_l half threads", "scale")
Inner = _struct(
    "Inner",
    "xz context y ungated parameters gap gap_delta sources rows",
    "batch length channels state width rank directions others xz_b xz_l y_b context_b context_l half threads way parts",
    "scale",
)
Routed = _struct(
    "Routed",
    "u projected parameters extra gap gap_delta y order rows",
    "batch length channels state rank routes slices u_b u_l order_b rows_b extra_b threads groups",
)
Blocks = _struct(
    "Blocks",
    "hidden residual context gap gap_delta parameters out stream ungated sources",
    "blocks each batch length dim channels state width rank directions others threads parts",
    "scale eps",
)

Linear = _struct("Linear", "x weight bias out", "rows inputs outputs x_l parts threads")


class Call:
    """The arguments of one call, and the tensors that must live until it returns."""

    def __init__(self, **numbers: float) -> None:
        self._alive: list[Tensor] = []
        self.numbers: dict[str, Any] = numbers

    def set(self, **tensors: Tensor) -> None:
        """Pass dense tensors."""
        for name, tensor in tensors.items():
            self._alive.append(tensor)
            self.numbers[name] = tensor.data_ptr()

    def rows(self, **tensors: Tensor | None) -> None:
        """Pass (B, L, c) tensors with their strides: slices of a projection are read in place."""
        for name, tensor in tensors.items():
            if tensor is not None:
                dense = tensor if tensor.stride(2) == 1 else tensor.contiguous()
                self._alive.append(dense)
                self.numbers[name] = dense.data_ptr()
                self.numbers[f"{name}_b"], self.numbers[f"{name}_l"], _ = dense.stride()

    def scan(self, inputs: ScanInputs) -> None:
        self.rows(u=inputs.u, delta=inputs.delta, B=inputs.B, C=inputs.C, z=inputs.z, shift=inputs.shift)
        if inputs.gap is not None:
            gap = inputs.gap.float().contiguous()
            self.set(gap=gap)
            self.numbers["gap_b"], self.numbers["gap_l"] = gap.stride()
        parameters = {"D": inputs.D, "bias": inputs.delta_bias, "gap_delta": inputs.gap_delta}
        self.set(**{name: value.float().contiguous() for name, value in parameters.items() if value is not None})
        batch, length, channels = inputs.u.shape
        self.numbers.update(batch=batch, length=length, channels=channels, state=inputs.A.shape[1])
        A = inputs.A.float()
        self.set(A=A)
        self.numbers["A_c"], self.numbers["A_n"] = A.stride()
        half = inputs.u.dtype == torch.bfloat16
        self.numbers.update(softplus=inputs.delta_softplus, reverse=inputs.reverse, half=half, half_out=half, scale=1.0)

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.rows(x=x)
        self.set(taps=weight.float().flatten(1).t().contiguous())  # no copy of what comes from `channels_last_taps`
        if bias is not None:
            self.set(bias=bias.float().contiguous())
        batch, length, channels = x.shape
        self.numbers.update(batch=batch, length=length, channels=channels, width=weight.shape[-1])
        self.numbers["half"] = x.dtype == torch.bfloat16

    def grid_convolution(self, inputs: GridConvInputs) -> None:
        self.convolution(*inputs[:3])
        self.numbers.update(rows=inputs.rows, columns=inputs.columns, outputs=inputs.outputs)
        if inputs.positions is not None:
            self.set(positions=inputs.positions.contiguous())

    def gate(self, ys: Sequence[Tensor], z: Tensor) -> None:
        self.set(**{f"y{number}": y.contiguous() for number, y in enumerate(ys)})
        self.rows(z=z)
        batch, length, channels = z.shape
        self.numbers.update(batch=batch, length=length, channels=channels, count=len(ys))
        self.numbers["half"] = z.dtype == torch.bfloat16

    def inner(self, inputs: InnerInputs) -> None:
        batch, length, width = inputs.xz.shape
        self.rows(xz=inputs.xz, context=inputs.context)
        self.set(parameters=inputs.parameters.contiguous())
        self._around(inputs)
        self.numbers.update(batch=batch, length=length, channels=width // 2, directions=len(inputs.parameters))
        self.numbers["y_b"] = length * width // 2
        self.numbers.update(state=inputs.d_state, width=inputs.d_conv, rank=inputs.dt_rank, scale=inputs.scale)
        self.numbers["half"] = inputs.xz.dtype == torch.bfloat16

    def blocks(self, inputs: BlocksInputs) -> None:
        batch, length, dim = inputs.hidden.shape
        sizes = BlockSizes(*inputs.sizes)
        self.set(hidden=inputs.hidden.float().contiguous())
        if inputs.residual is not None:
            self.set(residual=inputs.residual.contiguous())
        if inputs.context is not None:
            self.set(context=inputs.context.float().contiguous())
        self._around(inputs)
        self.set(parameters=inputs.parameters.contiguous())
        self.numbers.update(blocks=len(inputs.parameters), each=inputs.parameters.shape[1], batch=batch, length=length)
        self.numbers.update(dim=dim, channels=sizes.d_inner, state=sizes.d_state, width=sizes.d_conv)
        self.numbers.update(rank=sizes.dt_rank, directions=sizes.directions, scale=inputs.scale, eps=inputs.eps)
        self.numbers["parts"] = sizes.parts

    def routed(self, inputs: RoutedInputs) -> None:
        batch, length, channels = inputs.u.shape
        self.rows(u=inputs.u.float())
        self.set(projected=inputs.projected.float().contiguous(), parameters=inputs.parameters.contiguous())
        routes, slices = len(inputs.parameters), inputs.projected.shape[2]
        for name, values in (("order", inputs.order), ("rows", inputs.rows), ("extra", inputs.extra_B)):
            if values is not None:
                dense = (values.float() if values.is_floating_point() else values).contiguous()
                self.set(**{name: dense})
                self.numbers[f"{name}_b"] = 0 if dense.shape[1] == 1 else dense.stride(1)
        self._gaps(inputs)
        self.numbers.update(batch=batch, length=length, channels=channels, routes=routes, slices=slices)
        self.numbers.update(state=inputs.d_state, rank=inputs.projected.shape[3] - 2 * inputs.d_state)

    def linear(self, inputs: LinearInputs) -> None:
        x = inputs.x.flatten(0, -2) if inputs.x.ndim > 1 else inputs.x[None]
        x = x if x.stride(1) == 1 else x.contiguous()
        self.set(x=x, weight=inputs.weight.contiguous())
        if inputs.bias is not None:
            self.set(bias=inputs.bias.contiguous())
        self.numbers.update(rows=x.shape[0], inputs=x.shape[1], outputs=inputs.outputs, x_l=x.stride(0))
        self.numbers["parts"] = FLOAT_PARTS

    def _around(self, inputs: InnerInputs | BlocksInputs) -> None:
        """What pruned tokens leave behind."""
        self._gaps(inputs)
        if inputs.sources is not None and inputs.context is not None:
            self.set(sources=inputs.sources.contiguous())
            self.numbers["others"] = inputs.context.shape[1]

    def _gaps(self, inputs: InnerInputs | BlocksInputs | RoutedInputs) -> None:
        for name, values in (("gap", inputs.gap), ("gap_delta", inputs.gap_delta)):
            if values is not None:
                self.set(**{name: values.float().contiguous()})

    def struct(self, kind: type[ctypes.Structure]) -> ctypes.Structure:
        return kind(**self.numbers)
