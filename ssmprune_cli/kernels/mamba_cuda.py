"""Backend `mamba_cuda`: the unchanged scan kernel of the mamba-ssm package, made to align over pruned tokens.

The stock kernel knows one step size: exp(delta A) decays by it and delta B u drives by it. Given delta' = delta + s and
u' = u delta / delta', it decays by the longer step and drives as before; the skip D and the gate go outside. Without
alignment it gets everything as it is. It wants channels before tokens, and scans in reverse are flipped.

Written from mamba_ssm/ops/selective_scan_interface.py (state-spaces/mamba e9594ce). Inside a torch.library op autograd
records nothing, so its autograd function is called by hand, forward and backward.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.kernels.backend import Backend, no_states
from ssmprune_cli.kernels.inputs import Gradients, ScanInputs
from ssmprune_cli.kernels.pytorch import eager, finish, steps

MAX_STATE = 256  # what the stock kernel takes
CONV_WIDTHS = (2, 3, 4)  # what the stock convolution takes


class Context:
    """What torch hands to an autograd function to remember tensors in."""

    saved_tensors: tuple[Tensor | None, ...] = ()
    last: Tensor  # the state after the last token, if it was asked for

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def scan_with(stock: Any, inputs: ScanInputs) -> Tensor:
    """y of the aligned scan, by `stock`: an autograd function like mamba_ssm's SelectiveScanFn."""
    return _forward(stock, inputs)[0].to(inputs.u.dtype)


def scan_and_state_with(stock: Any, inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """y, and the state (B, E, N) after the last token in scan direction, which the stock kernel's backward ignores."""
    y, context, _ = _forward(stock, inputs, return_last_state=True)
    return y.to(inputs.u.dtype), context.last


def gradients_with(stock: Any, grad: Tensor, inputs: ScanInputs) -> Gradients:
    """Gradients in the order of `Backend.scan_backward`.

    Where a step and its shift are both exactly 0 the stock kernel cannot tell the gradient that reaches delta through
    the drive; it is left out. Softplus gives no such step above -100.
    """
    y, context, exact = _forward(stock, inputs)
    grad = grad.to(y.dtype)
    if not _is_aligned(inputs):
        d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, *_ = stock.backward(context, _channels_first(grad, inputs))
        d_z = None if d_z is None else _channels_last(d_z, inputs)
        d_shift = d_gap_delta = None
        d_u, d_delta = _channels_last(d_u, inputs), _channels_last(d_delta, inputs)
    else:
        u, D, z, gap = exact.u, exact.D, exact.z, exact.gap
        delta, decay = steps(exact)
        through, d_z, d_D, d_bias = grad, None, None, None
        if z is not None:
            gate = torch.sigmoid(z)
            through, d_z = grad * z * gate, grad * context.ungated * gate * (1 + z * (1 - gate))
        found = stock.backward(context, _channels_first(through, inputs))
        d_driven, d_decay = (_channels_last(tensor, inputs) for tensor in found[:2])
        d_A, d_B, d_C = found[2:5]
        inverse = _inverse(decay)
        d_u = d_driven * delta * inverse
        d_step = d_driven * u * inverse
        d_decay = d_decay - d_step * delta * inverse
        if D is not None:
            d_u, d_D = d_u + D * through, (through * u).sum(dim=(0, 1))
        d_shift = None if exact.shift is None else d_decay
        d_gap_delta = None
        if gap is not None and exact.gap_delta is None:
            d_step = d_step + d_decay * gap[..., None]
        elif gap is not None:
            d_gap_delta = (d_decay * gap[..., None]).sum(dim=(0, 1))
        d_delta = d_step + d_decay
        if inputs.delta_softplus:
            raw = exact.delta if exact.delta_bias is None else exact.delta + exact.delta_bias
            d_delta = d_delta * torch.sigmoid(raw)
        if exact.delta_bias is not None:
            d_bias = d_delta.sum(dim=(0, 1))
    d_B, d_C = (_channels_last(tensor, inputs) for tensor in (d_B, d_C))
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "shift", "gap_delta")
    found = (d_u, d_delta, d_A, d_B, d_C, d_D, d_z, d_bias, d_shift, d_gap_delta)
    given = [getattr(inputs, name) for name in names]
    return tuple(
        None if like is None or value is None else value.to(like.dtype)
        for value, like in zip(found, given, strict=True)
    )


def _forward(stock: Any, inputs: ScanInputs, return_last_state: bool = False) -> tuple[Tensor, Any, ScanInputs]:
    """y (B, L, E), what `stock` remembers (with the last state if it is wanted), and the inputs as computed with."""
    context: Any = Context()
    if not _is_aligned(inputs):
        exact = _single(inputs, ("A", "D", "delta_bias"))
        D, z, bias = exact.D, None if exact.z is None else _channels_first(exact.z, inputs), exact.delta_bias
        u, delta, softplus = exact.u, exact.delta, inputs.delta_softplus
    else:
        # delta' and u' would lose digits in half precision that raw step sizes do not: all in float32.
        exact = _single(inputs, ScanInputs._fields)
        D, z, bias, softplus = None, None, None, False
        step, delta = steps(exact)
        u = exact.u * step * _inverse(delta)
    y = stock.forward(
        context,
        *(_channels_first(tensor, inputs) for tensor in (u, delta)),
        exact.A,
        *(_channels_first(tensor, inputs) for tensor in (exact.B, exact.C)),
        D,
        z,
        bias,
        softplus,
        return_last_state,
    )
    if return_last_state:
        y, last = y
        context.last = last.float().contiguous()
    y = _channels_last(y, inputs)
    if _is_aligned(inputs):
        context.ungated = finish(y, exact._replace(z=None))
        y = finish(y, exact)
    return y, context, exact


def _single(inputs: ScanInputs, names: Iterable[str]) -> ScanInputs:
    """`inputs` with the tensors called `names` in float32."""
    given = {name: getattr(inputs, name) for name in names}
    single: dict[str, Any] = {name: value.float() for name, value in given.items() if isinstance(value, Tensor)}
    return inputs._replace(**single)


def _is_aligned(inputs: ScanInputs) -> bool:
    return inputs.shift is not None or inputs.gap is not None


def _inverse(decay: Tensor) -> Tensor:
    """1 / decay, and 0 where a token neither decays nor drives."""
    return torch.where(decay == 0, 0, 1 / torch.where(decay == 0, 1, decay))


def _channels_first(tensor: Tensor, inputs: ScanInputs) -> Tensor:
    """(B, L, E) to (B, E, L) in scan order."""
    return (tensor.flip(1) if inputs.reverse else tensor).transpose(1, 2).contiguous()


def _channels_last(tensor: Tensor, inputs: ScanInputs) -> Tensor:
    """(B, E, L) in scan order to (B, L, E)."""
    tensor = tensor.transpose(1, 2)
    return (tensor.flip(1) if inputs.reverse else tensor).contiguous()


class MambaCudaBackend(Backend):
    """Imports mamba-ssm, and causal-conv1d if it is there, when it is first asked for."""

    name = "mamba_cuda"
    carries_states = False

    def __init__(self) -> None:
        self._stock: Any = None
        self._conv: Any = None
        self._reason: str | None = None

    def missing(self) -> str | None:
        if self._stock is None and self._reason is None:
            self._reason = self._load()
        return self._reason

    def _load(self) -> str | None:
        if importlib.util.find_spec("mamba_ssm") is None:
            return "the package mamba-ssm is not installed"
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        try:
            self._stock = importlib.import_module("mamba_ssm.ops.selective_scan_interface").SelectiveScanFn
        except Exception as error:  # a package built for another PyTorch fails in ways of its own
            return f"mamba-ssm cannot be imported: {error}"
        if importlib.util.find_spec("causal_conv1d") is not None:
            self._conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
        return None

    def accepts(self, example: Tensor, inner: int) -> bool:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        return example.dtype in dtypes and example.device.type == "cuda" and inner <= MAX_STATE

    def scan(self, inputs: ScanInputs) -> Tensor:
        return scan_with(self._stock, inputs)

    def scan_with_states(self, inputs: ScanInputs, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
        return *scan_and_state_with(self._stock, inputs), no_states(inputs)

    def scan_backward(
        self, grad: Tensor, inputs: ScanInputs, states: Tensor | None = None, d_last: Tensor | None = None
    ) -> Gradients:
        return *gradients_with(self._stock, grad, inputs), None

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        """By causal-conv1d for the widths it knows, else by PyTorch."""
        if self._conv is None or weight.shape[1] not in CONV_WIDTHS:
            return eager.conv_silu(x, weight, bias, reverse)
        given = (x.flip(1) if reverse else x).transpose(1, 2).contiguous()  # (B, E, L)
        y: Tensor = self._conv(given, weight.contiguous(), bias, activation="silu").transpose(1, 2)
        return (y.flip(1) if reverse else y).contiguous()

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """By PyTorch: the arguments of causal-conv1d's backward pass change from release to release."""
        return eager.conv_gradients(grad, x, weight, bias, reverse)


MAMBA_CUDA = MambaCudaBackend()
