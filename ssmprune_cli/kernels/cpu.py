"""Backend `cpu`: the C kernels of csrc/scan.c, called through ctypes. float32 on CPUs."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.backend import Backend, Gradients, ScanInputs
from ssmprune_cli.kernels.build import load_library

# Names and order of the structs in csrc/scan.c.
_SCAN_POINTERS = "u delta A B C D z bias shift gap gap_delta grad"
_SCAN_RESULTS = "y du ddelta dA dB dC dD dz dbias dshift dgap_delta"
_SCAN_NUMBERS = (
    "batch length channels state u_b u_l delta_b delta_l B_b B_l C_b C_l z_b z_l shift_b shift_l gap_b gap_l "
    "softplus reverse threads groups"
)
_CONV_POINTERS = "x weight bias grad y dx dweight dbias"
_CONV_NUMBERS = "batch length channels width x_b x_l reverse threads"


def _struct(name: str, pointers: str, numbers: str) -> type[ctypes.Structure]:
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    return type(
        name, (ctypes.Structure,), {"_fields_": fields + [(field, ctypes.c_int64) for field in numbers.split()]}
    )


_Scan = _struct("Scan", f"{_SCAN_POINTERS} {_SCAN_RESULTS}", _SCAN_NUMBERS)
_Conv = _struct("Conv", _CONV_POINTERS, _CONV_NUMBERS)
MAX_INNER = 64  # states or taps, as in csrc/scan.c


class CpuBackend(Backend):
    """Compiles its library when it is first asked for."""

    name = "cpu"

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

    def accepts(self, example: Tensor, inner: int) -> bool:
        return example.dtype == torch.float32 and example.device.type == "cpu" and inner <= MAX_INNER

    def scan(self, inputs: ScanInputs) -> Tensor:
        y = torch.empty(inputs.u.shape)
        call = _Call(inputs)
        call.set(y=y)
        self._run("scan_forward", call.struct)
        return y

    def scan_backward(self, grad: Tensor, inputs: ScanInputs) -> Gradients:
        batch, length, channels = inputs.u.shape
        state, threads = inputs.A.shape[1], torch.get_num_threads()
        groups = -(-threads // batch) if batch else 1  # so that every thread has work when the batch is small
        wide, per_sample = (batch, length, channels), (batch, channels)
        d_u, d_delta = torch.empty(wide), torch.empty(wide)
        d_z = None if inputs.z is None else torch.empty(wide)
        d_shift = None if inputs.shift is None else torch.empty(wide)
        d_A, d_D = torch.empty(batch, channels, state), torch.empty(per_sample)
        d_bias, d_gap_delta = torch.empty(per_sample), torch.empty(per_sample)
        d_B, d_C = (torch.empty(batch, groups, length, state) for _ in range(2))
        call = _Call(inputs, groups=groups)
        call.set(
            grad=grad.contiguous(),
            du=d_u,
            ddelta=d_delta,
            dA=d_A,
            dB=d_B,
            dC=d_C,
            dD=d_D,
            dz=d_z,
            dbias=d_bias,
            dshift=d_shift,
            dgap_delta=d_gap_delta,
        )
        if self._run("scan_backward", call.struct):
            raise KernelError("memory ran out in the backward pass of a scan", hint="Use a smaller batch.")
        return (
            d_u,
            d_delta,
            d_A.sum(dim=0),
            d_B.sum(dim=1),
            d_C.sum(dim=1),
            None if inputs.D is None else d_D.sum(dim=0),
            d_z,
            None if inputs.delta_bias is None else d_bias.sum(dim=0),
            d_shift,
            None if inputs.gap_delta is None else d_gap_delta.sum(dim=0),
        )

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        y = torch.empty(x.shape)
        call = _Call.convolution(x, weight, bias, reverse)
        call.set(y=y)
        self._run("conv_forward", call.struct)
        return y

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, _, channels = x.shape
        d_x, d_weight = torch.zeros(x.shape), torch.empty(batch, channels, weight.shape[1])
        d_bias = torch.empty(batch, channels)
        call = _Call.convolution(x, weight, bias, reverse)
        call.set(grad=grad.contiguous(), dx=d_x, dweight=d_weight, dbias=d_bias)
        self._run("conv_backward", call.struct)
        return d_x, d_weight.sum(dim=0), d_bias.sum(dim=0)

    def _run(self, name: str, struct: ctypes.Structure) -> int:
        if self._library is None:
            raise KernelError(f"kernel backend 'cpu' cannot be used: {self._reason}", hint="See `ssmprune env`.")
        return int(getattr(self._library, name)(ctypes.byref(struct)))


class _Call:
    """The arguments of one call: the struct, and the tensors that must live until it returns."""

    def __init__(self, inputs: ScanInputs | None = None, groups: int = 1) -> None:
        self._alive: list[Tensor] = []
        self.struct: Any
        if inputs is None:
            return
        batch, length, channels = inputs.u.shape
        self.struct = _Scan(
            batch=batch,
            length=length,
            channels=channels,
            state=inputs.A.shape[1],
            softplus=inputs.delta_softplus,
            reverse=inputs.reverse,
            threads=torch.get_num_threads(),
            groups=groups,
        )
        rows = {name: getattr(inputs, name) for name in ("u", "delta", "B", "C", "z", "shift", "gap")}
        for name, tensor in rows.items():
            if tensor is not None:
                # Slices of a projection are read in place; only the innermost dimension has to be dense.
                dense = tensor if name == "gap" or tensor.stride(2) == 1 else tensor.contiguous()
                dense = dense.contiguous() if name == "gap" else dense
                self.set(**{name: dense})
                setattr(self.struct, f"{name}_b", dense.stride(0))
                setattr(self.struct, f"{name}_l", dense.stride(1))
        whole = {"A": inputs.A, "D": inputs.D, "bias": inputs.delta_bias, "gap_delta": inputs.gap_delta}
        self.set(**{name: tensor.contiguous() for name, tensor in whole.items() if tensor is not None})

    @classmethod
    def convolution(cls, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> _Call:
        call = cls()
        x = x if x.stride(2) == 1 else x.contiguous()
        batch, length, channels = x.shape
        call.struct = _Conv(
            batch=batch,
            length=length,
            channels=channels,
            width=weight.shape[1],
            x_b=x.stride(0),
            x_l=x.stride(1),
            reverse=reverse,
            threads=torch.get_num_threads(),
        )
        call.set(x=x, weight=weight.contiguous(), bias=bias.contiguous())
        return call

    def set(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                self._alive.append(tensor)
                setattr(self.struct, name, tensor.data_ptr())


CPU = CpuBackend()
