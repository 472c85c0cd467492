"""Backends in plain PyTorch: `reference`, one step at a time, the truth; `chunked`, the same in fewer, larger operations.

Both compute in the inputs' own precision and take gradients by autograd through a recomputed forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.backend import Backend, Gradients, ScanInputs

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "shift", "gap_delta")
CHUNK = 16  # steps whose decays and inputs are computed at once; more only costs memory


def steps(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """(B, L, E) each: the step size of every token, and its decay time, the step plus what alignment adds."""
    delta = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias
    if inputs.delta_softplus:
        delta = functional.softplus(delta)
    if inputs.shift is not None:
        return delta, delta + inputs.shift
    if inputs.gap is not None:
        return delta, delta + inputs.gap[..., None] * (delta if inputs.gap_delta is None else inputs.gap_delta)
    return delta, delta


def finish(y: Tensor, inputs: ScanInputs) -> Tensor:
    """Add the D skip and apply the gate."""
    if inputs.D is not None:
        y = y + inputs.D * inputs.u
    return y if inputs.z is None else y * functional.silu(inputs.z)


def reference_scan(inputs: ScanInputs) -> Tensor:
    """h_t = exp(decay_t A) h_{t-1} + delta_t B_t u_t; y_t = C_t . h_t, token by token."""
    delta, decay = steps(inputs)
    batch, length, channels = inputs.u.shape
    state = inputs.u.new_zeros(batch, channels, inputs.A.shape[1])
    outputs: list[Tensor] = [state] * length
    for t in reversed(range(length)) if inputs.reverse else range(length):
        drive = (delta[:, t] * inputs.u[:, t])[..., None] * inputs.B[:, t, None]  # (B, E, N)
        state = torch.exp(decay[:, t, :, None] * inputs.A) * state + drive
        outputs[t] = (state * inputs.C[:, t, None]).sum(dim=-1)
    return finish(torch.stack(outputs, dim=1), inputs)


def chunked_scan(inputs: ScanInputs) -> Tensor:
    """As `reference_scan`, with decays, drives and read-outs of CHUNK tokens in one operation each."""
    delta, decay = steps(inputs)
    drive = delta * inputs.u
    batch, length, channels = inputs.u.shape
    state = inputs.u.new_zeros(batch, channels, inputs.A.shape[1])
    starts = range(0, length, CHUNK)
    outputs: dict[int, Tensor] = {}
    for start in reversed(starts) if inputs.reverse else starts:
        part = slice(start, min(start + CHUNK, length))
        decays = torch.exp(decay[:, part, :, None] * inputs.A).unbind(dim=1)
        drives = (drive[:, part, :, None] * inputs.B[:, part, None]).unbind(dim=1)
        order = range(len(decays))
        states: list[Tensor] = [state] * len(decays)
        for t in reversed(order) if inputs.reverse else order:
            state = torch.addcmul(drives[t], decays[t], state)
            states[t] = state
        # (B, T, E, N) x (B, T, N, 1) -> (B, T, E)
        outputs[start] = (torch.stack(states, dim=1) @ inputs.C[:, part, :, None])[..., 0]
    return finish(torch.cat([outputs[start] for start in starts], dim=1), inputs)


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
    """silu(depthwise causal convolution): token t sees t - K + 1 ... t, or t ... t + K - 1 in reverse."""
    width = weight.shape[1]
    kernel = weight.flip(1) if reverse else weight
    pad = (0, width - 1) if reverse else (width - 1, 0)
    channels_first = functional.pad(x.transpose(1, 2), pad)  # (B, E, L + K - 1)
    y = functional.conv1d(channels_first, kernel[:, None], bias, groups=weight.shape[0])
    return functional.silu(y).transpose(1, 2).contiguous()


class PyTorchBackend(Backend):
    """Runs anywhere that PyTorch does, in any floating-point precision."""

    def __init__(self, name: str, scan: Callable[[ScanInputs], Tensor]) -> None:
        self.name = name
        self._scan = scan

    def missing(self) -> str | None:
        return None

    def accepts(self, example: Tensor) -> bool:
        return example.is_floating_point()

    def scan(self, inputs: ScanInputs) -> Tensor:
        return self._scan(inputs)

    def scan_backward(self, grad: Tensor, inputs: ScanInputs) -> Gradients:
        given = {f.name: getattr(inputs, f.name) for f in fields(inputs)}
        leaves = {name: given[name].detach().requires_grad_() for name in DIFFERENTIABLE if given[name] is not None}
        with torch.enable_grad():
            y = self._scan(replace(inputs, **leaves))
        found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))
        return tuple(found.get(name) for name in DIFFERENTIABLE)

    def conv(self, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool) -> Tensor:
        return conv_silu(x, weight, bias, reverse)

    def conv_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, reverse: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        with torch.enable_grad():
            y = conv_silu(leaves[0], leaves[1], leaves[2], reverse)
        found = torch.autograd.grad(y, leaves, grad)
        return found[0], found[1], found[2]


REFERENCE = PyTorchBackend("reference", reference_scan)
CHUNKED = PyTorchBackend("chunked", chunked_scan)
