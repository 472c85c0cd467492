"""The arguments of one call of the C kernels in csrc/: its struct, filled from tensors that were seen to fit.

C reads where it is told to, so that nothing gets there whose size, dtype or place is not what the struct says.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.inputs import (
    BlocksInputs,
    GridConvInputs,
    InnerInputs,
    LinearInputs,
    RoutedInputs,
    ScanInputs,
    tokens_and_steps,
)
from ssmprune_cli.kernels.packing import FLOAT_PARTS, BlockSizes, byte_words, tiled_words

MOST_YS = 4  # terms of a gated sum or of a score, as in csrc/rows.h and csrc/prune.c


def _struct(name: str, pointers: str, numbers: str, real: str = "") -> type[ctypes.Structure]:
    kinds = ((pointers, ctypes.c_void_p), (numbers, ctypes.c_int64), (real, ctypes.c_double))
    fields = [(field, kind) for names, kind in kinds for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# Names and order of the structs in csrc/.
Scan = _struct(
    "Scan",
    "u delta B C z shift grad y du ddelta dz dshift A D bias gap gap_delta dA dB dC dD dbias dgap_delta slots visits "
    "rank dt_weight sum skip size ungated states initial last dlast dinitial",
    "batch length channels state u_b u_l delta_b delta_l B_b B_l C_b C_l z_b z_l shift_b shift_l gap_b gap_l A_c A_n "
    "softplus reverse half half_out threads groups outputs rank_l R stay",
    "scale mass",
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
Sum = _struct("Sum", "x y", "outer count columns threads")
Gate = _struct("Gate", "y0 y1 y2 y3 z grad out dy dz", "batch length channels count z_b z_l half threads", "scale")
Inner = _struct(
    "Inner",
    "xz context y ungated parameters gap gap_delta size sources slots cells read rows",
    "batch length channels state width rank directions others xz_b xz_l y_b context_b context_l half threads way parts "
    "dots tokens steps whole before carry begun",
    "scale mass",
)
Routed = _struct(
    "Routed",
    "u projected parameters extra gap gap_delta y order rows",
    "batch length channels state rank routes slices u_b u_l order_b rows_b extra_b threads groups",
)
Blocks = _struct(
    "Blocks",
    "hidden residual context gap gap_delta size mass parameters out stream ungated sources slots cells read",
    "blocks each batch length dim channels state width rank directions others threads parts tiles "
    "eight_bits dots tokens steps",
    "scale eps",
)
Linear = _struct("Linear", "x weight bias out", "rows inputs outputs x_l parts eight_bits dots threads")
Score = _struct("Score", "y0 y1 y2 y3 score", "rows channels count kind threads")
Order = _struct("Order", "score positions protected live order", "batch length count ordered protections threads")
Move = _struct(
    "Move",
    "hidden residual older positions order older_positions kept_hidden kept_residual gaps dropped kept_positions "
    "dropped_positions",
    "batch length channels count ordered others hidden_b hidden_l residual_b residual_l threads",
)
STRUCTS = (Scan, Conv, Norm, NormBack, Sum, Gate, Inner, Routed, Blocks, Linear, Score, Order, Move)


def check_structs(library: ctypes.CDLL) -> None:
    """Raise OSError, naming the struct, unless both sides have the same fields at the same places."""
    for struct in STRUCTS:
        name = struct.__name__
        try:
            fields, size = getattr(library, f"{name}_fields"), getattr(library, f"{name}_size")
        except AttributeError:
            raise OSError(f"the library of C kernels says nothing of the struct {name}") from None
        fields.restype, size.restype = ctypes.c_char_p, ctypes.c_int64
        own = [(field, kind) for field, kind, *_ in struct._fields_]
        if own != _declared(fields().decode()) or size() != ctypes.sizeof(struct):
            raise OSError(f"the library of C kernels has another struct {name} than call.py")


def _declared(text: str) -> list[tuple[str, type]]:
    """Names and types of the fields of a struct in C."""
    found: list[tuple[str, type]] = []
    for declaration in text.split(";"):
        number = ctypes.c_double if "double" in declaration else ctypes.c_int64
        for each in filter(str.strip, declaration.split(",")):
            name, count = re.findall(r"(\w+)(?:\[(\d+)\])?\s*$", each)[0]
            names = [f"{name}{index}" for index in range(int(count))] if count else [name]
            found += [(name, ctypes.c_void_p if "*" in each else number) for name in names]
    return found


class Call:
    """The arguments of one call, and the tensors that must live until it returns.

    Raises KernelError for a tensor that does not fit.
    """

    def __init__(self, **numbers: float) -> None:
        self._alive: list[Tensor] = []
        self.numbers: dict[str, Any] = numbers

    def set(self, **tensors: Tensor) -> None:
        """Pass dense tensors of our own making."""
        for name, tensor in tensors.items():
            self._pass(name, tensor)

    def _pass(self, name: str, tensor: Tensor) -> None:
        self._alive.append(tensor)
        self.numbers[name] = tensor.data_ptr()

    def values(self, name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Pass what has this shape and dtype, if it is there."""
        if tensor is not None:
            fits(name, tensor, shape, dtype)
            self._pass(name, tensor.contiguous())

    def floats(self, name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
        """Pass what has this shape as float32, if it is there."""
        if tensor is not None:
            fits(name, tensor, shape, tensor.dtype if tensor.is_floating_point() else torch.float32)
            self._pass(name, tensor.float().contiguous())

    def rows(self, name: str, tensor: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Pass (B, L, c) with its strides, if it is there: slices of a projection are read in place."""
        if tensor is not None:
            fits(name, tensor, shape, dtype)
            dense = dense_rows(tensor)
            self._pass(name, dense)
            self.numbers[f"{name}_b"], self.numbers[f"{name}_l"], _ = dense.stride()

    def scan(self, inputs: ScanInputs) -> None:
        _dimensions("u", inputs.u, 3)
        _dimensions("A", inputs.A, 2)
        batch, length, channels = inputs.u.shape
        dtype, state = inputs.u.dtype, inputs.A.shape[1]
        for name in ("u", "delta", "z", "shift"):
            self.rows(name, getattr(inputs, name), (batch, length, channels), dtype)
        for name in ("B", "C"):
            self.rows(name, getattr(inputs, name), (batch, length, state), dtype)
        self.floats("gap", inputs.gap, (batch, length))
        if inputs.gap is not None:
            self.numbers.update(gap_b=length, gap_l=1)
        for name, values in (("D", inputs.D), ("bias", inputs.delta_bias), ("gap_delta", inputs.gap_delta)):
            self.floats(name, values, (channels,))
        self.state("initial", inputs.initial_state, (batch, channels, state))
        fits("A", inputs.A, (channels, state), inputs.A.dtype)
        A = inputs.A.float()
        self.set(A=A)
        self.numbers["A_c"], self.numbers["A_n"] = A.stride()
        self.numbers.update(batch=batch, length=length, channels=channels, state=state)
        half = dtype == torch.bfloat16
        self.numbers.update(softplus=inputs.delta_softplus, reverse=inputs.reverse, half=half, half_out=half, scale=1.0)

    def state(self, name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
        """Pass states (B, E, N) as (B, N, E), if they are there."""
        if tensor is not None:
            fits(name, tensor, shape, torch.float32)
            self._pass(name, tensor.transpose(1, 2).contiguous())

    def convolution(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """With weight (E, K) or (E, K, K)."""
        _dimensions("x", x, 3)
        batch, length, channels = x.shape
        width = weight.shape[-1] if weight.ndim > 1 else 0
        fits("weight", weight, (channels, *[width] * (weight.ndim - 1)), weight.dtype)
        self.rows("x", x, x.shape, x.dtype)
        self.set(taps=weight.float().flatten(1).t().contiguous())  # no copy of what comes from `channels_last_taps`
        self.floats("bias", bias, (channels,))
        self.numbers.update(batch=batch, length=length, channels=channels, width=width)
        self.numbers["half"] = x.dtype == torch.bfloat16

    def sparse_convolution(self, x: Tensor, context: Tensor, sources: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.convolution(x, weight, bias)
        _dimensions("context", context, 3)
        batch, length, channels = x.shape
        self.rows("context", context, (batch, context.shape[1], channels), x.dtype)
        self.values("positions", sources, (batch, length, weight.shape[1]), torch.int64)
        self.numbers["others"] = context.shape[1]

    def grid_convolution(self, inputs: GridConvInputs) -> None:
        _dimensions("weight", inputs.weight, 3)
        self.convolution(*inputs[:3])
        batch, length, _ = inputs.x.shape
        self.numbers.update(rows=inputs.rows, columns=inputs.columns, outputs=inputs.outputs)
        self.values("positions", inputs.positions, (batch, length), torch.int64)
        whole = inputs.positions is not None or length == inputs.rows * inputs.columns
        if not whole or not 0 <= inputs.outputs <= length or min(inputs.rows, inputs.columns) < 0:
            grid = f"a grid of {inputs.rows} x {inputs.columns}"
            raise KernelError(f"{length} tokens, of which {inputs.outputs} are computed, do not fit {grid}")

    def gate(self, ys: Sequence[Tensor], z: Tensor) -> None:
        _dimensions("z", z, 3)
        for number, y in enumerate(ys):
            self.values(f"y{number}", y, z.shape, z.dtype)
        self.rows("z", z, z.shape, z.dtype)
        batch, length, channels = z.shape
        self.numbers.update(batch=batch, length=length, channels=channels, count=len(ys))
        self.numbers["half"] = z.dtype == torch.bfloat16

    def inner(self, inputs: InnerInputs) -> None:
        _dimensions("xz", inputs.xz, 3)
        batch, length, width = inputs.xz.shape
        sizes = BlockSizes(width // 2, inputs.d_state, inputs.d_conv, inputs.dt_rank, len(inputs.parameters))
        self.rows("xz", inputs.xz, (batch, length, 2 * sizes.d_inner), inputs.xz.dtype)
        self.values("parameters", inputs.parameters, (sizes.directions, sizes.inner), torch.float32)
        if inputs.context is not None:
            _dimensions("context", inputs.context, 3)
            shape = (batch, inputs.context.shape[1], sizes.d_inner)
            self.rows("context", inputs.context, shape, inputs.xz.dtype)
        self.floats("gap_delta", inputs.gap_delta, (sizes.directions, sizes.d_inner))
        self._sizes(inputs, batch, length, sizes)
        self.numbers.update(y_b=length * sizes.d_inner, scale=inputs.scale)
        if inputs.mass is not None:
            self.numbers["mass"] = float(inputs.mass)
        self.numbers["half"] = inputs.xz.dtype == torch.bfloat16

    def blocks(self, inputs: BlocksInputs) -> None:
        _dimensions("hidden", inputs.hidden, 3)
        batch, length, dim = inputs.hidden.shape
        sizes, count = BlockSizes(*inputs.sizes), len(inputs.parameters)
        if sizes.parts not in (0, 1, FLOAT_PARTS):
            raise KernelError(f"weights in {sizes.parts} parts are not for {inputs.hidden.dtype}")
        if not count:
            raise KernelError("there are 0 blocks: one is needed")
        self.floats("hidden", inputs.hidden, (batch, length, dim))
        self.values("residual", inputs.residual, (batch, length, dim), torch.float32)
        if inputs.context is not None:
            _dimensions("context", inputs.context, 3)
            self.floats("context", inputs.context, (batch, inputs.context.shape[1], dim))
        each = sizes.block(dim)
        self.values("parameters", inputs.parameters, (count, each), torch.float32)
        self.floats("gap_delta", inputs.gap_delta, (count, sizes.directions, sizes.d_inner))
        self.floats("mass", inputs.mass, (count,))
        self._sizes(inputs, batch, length, sizes)
        self.numbers.update(blocks=count, each=each, dim=dim, parts=sizes.parts)
        self.numbers["eight_bits"] = sizes.eight_bits
        self.numbers.update(scale=inputs.scale, eps=inputs.eps)

    def routed(self, inputs: RoutedInputs) -> None:
        _dimensions("u", inputs.u, 3)
        _dimensions("projected", inputs.projected, 4)
        batch, length, channels = inputs.u.shape
        routes, slices, state = len(inputs.parameters), inputs.projected.shape[2], inputs.d_state
        rank = inputs.projected.shape[3] - 2 * state
        if slices not in (1, routes) or min(rank, state) < 0:
            raise KernelError(f"projected has shape {tuple(inputs.projected.shape)} for {routes} routes")
        self.rows("u", inputs.u.float(), (batch, length, channels), torch.float32)
        self.floats("projected", inputs.projected, (batch, length, slices, rank + 2 * state))
        self.values("parameters", inputs.parameters, (routes, channels * (rank + state + 2)), torch.float32)
        for name, given, own in (
            ("order", inputs.order, ()),
            ("rows", inputs.rows, ()),
            ("extra", inputs.extra_B, (state,)),
        ):
            if given is not None:
                samples = 1 if given.shape[1:2] == (1,) else batch
                shape = (routes, samples, length, *own)
                self.floats(name, given, shape) if own else self.values(name, given, shape, torch.int64)
                self.numbers[f"{name}_b"] = 0 if samples == 1 else length * (state if own else 1)
        self.floats("gap", inputs.gap, (routes, batch, length))
        self.floats("gap_delta", inputs.gap_delta, (routes, channels))
        self.numbers.update(batch=batch, length=length, channels=channels, routes=routes, slices=slices)
        self.numbers.update(state=state, rank=rank)

    def linear(self, inputs: LinearInputs, *, eight_bits: bool = False) -> None:
        x = inputs.x.flatten(0, -2) if inputs.x.ndim > 1 else inputs.x[None]
        x = x if x.stride(1) == 1 else x.contiguous()
        fits("x", x, x.shape, torch.float32)
        width, outputs = x.shape[1], inputs.outputs
        self.set(x=x)
        words = byte_words(outputs, width) if eight_bits else tiled_words(outputs, width, FLOAT_PARTS)
        self.values("weight", inputs.weight, (words,), torch.float32)
        self.values("bias", inputs.bias, (outputs,), torch.float32)
        self.numbers.update(rows=x.shape[0], inputs=width, outputs=outputs, x_l=x.stride(0), parts=FLOAT_PARTS)
        self.numbers["eight_bits"] = eight_bits

    def _sizes(self, inputs: InnerInputs | BlocksInputs, batch: int, length: int, sizes: BlockSizes) -> None:
        """Sizes, and what pruned tokens leave behind."""
        if min(sizes) < 0:
            raise KernelError(f"a block has no sizes like {tuple(sizes)}")
        if sizes.directions not in (1, 2):
            raise KernelError(f"there are {sizes.directions} directions")
        if (inputs.context is None) != (inputs.sources is None):
            raise KernelError("context and sources go together")
        if (inputs.size is None) != (inputs.mass is None):
            raise KernelError("size and mass go together")
        if inputs.cells is not None and (inputs.read is None or inputs.size is None):
            raise KernelError("cells need read and size")
        tokens, steps = tokens_and_steps(length, None if inputs.sources is None else inputs.sources.shape, inputs.cells)
        self.values("sources", inputs.sources, (sizes.directions, batch, tokens, sizes.d_conv), torch.int64)
        self.floats("gap", inputs.gap, (sizes.directions, batch, steps))
        self.floats("size", inputs.size, (batch, steps))
        self.values("cells", inputs.cells, (batch, length), torch.int64)
        if inputs.read is None and tokens != length:
            raise KernelError(f"there are {tokens} tokens, and read does not say which {length} of them are read")
        if inputs.read is not None:
            fits("read", inputs.read, (batch, length), torch.int64)
            if inputs.sources is None:
                raise KernelError("read needs sources")
            slots = slots_of(inputs.read, batch, tokens)
            self.set(read=inputs.read.contiguous()) if inputs.cells is not None else self.set(slots=slots)
        self.numbers["others"] = 0 if inputs.context is None else inputs.context.shape[1]
        self.numbers.update(tokens=tokens, steps=steps)
        self.numbers.update(batch=batch, length=length, channels=sizes.d_inner, state=sizes.d_state)
        self.numbers.update(width=sizes.d_conv, rank=sizes.dt_rank, directions=sizes.directions)

    def struct(self, kind: type[ctypes.Structure]) -> ctypes.Structure:
        return kind(**self.numbers)


def dense_rows(tensor: Tensor) -> Tensor:
    """`tensor` (B, L, c) with neighbouring channels side by side."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def slots_of(read: Tensor, batch: int, length: int) -> Tensor:
    """(B, L): which of the tokens `read` (B, K) each token is, -1 if none of them."""
    if read.ndim != 2 or len(read) != batch or read.dtype != torch.int64:
        raise KernelError(f"read must be int64 (B, K), not {read.dtype} {tuple(read.shape)}")
    if read.numel() and not 0 <= int(read.min()) <= int(read.max()) < length:
        raise KernelError("read names a token that is not there")
    slots = torch.full((batch, length), -1).scatter_(1, read, torch.arange(read.shape[1]).expand(batch, -1))
    if int((slots >= 0).sum()) != read.numel():
        raise KernelError("read names a token twice")
    return slots


def _dimensions(name: str, tensor: Tensor, count: int) -> None:
    if tensor.ndim != count:
        raise KernelError(f"{name} has shape {tuple(tensor.shape)}, which are not {count} dimensions")


def fits(name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise KernelError for a tensor of another shape or dtype, or of another device."""
    if tensor.shape != tuple(shape):
        raise KernelError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
    if tensor.dtype != dtype:
        raise KernelError(f"{name} must be {dtype}, not {tensor.dtype}")
    if not tensor.is_cpu:
        raise KernelError(f"{name} is on {tensor.device}, not on the CPU")
