"""Backends in plain PyTorch: `reference`, step by step, the truth; `chunked`, the same in fewer, larger operations.

Both compute in the activations' precision, float32 at least, and share the backward pass, which recomputes the states
chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.backend import Backend, Gradients, ScanInputs
from ssmprune_cli.kernels.eager import wide

CHUNK_VALUES = 1 << 18  # entries of the states worked on at once: a few tensors of this size fit into a cache


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
    """As `reference_scan`, with decays, drives and read-outs of several tokens in one operation each."""
    delta, decay = steps(inputs)
    drive = delta * inputs.u
    batch, _, channels = inputs.u.shape
    state = inputs.u.new_zeros(batch, channels, inputs.A.shape[1])
    y = torch.empty_like(inputs.u)
    for part in _chunks(inputs):
        states, _ = _states(inputs, decay, drive, part, state)
        state = states[0 if inputs.reverse else -1]
        y[:, part] = _dot(states, inputs.C, part)
    return finish(y, inputs)


def _chunks(inputs: ScanInputs) -> list[slice]:
    """Token ranges in scan order: few tokens of large batches, and more of small ones."""
    batch, length, _ = inputs.u.shape
    size = min(max(CHUNK_VALUES // max(batch * inputs.A.numel(), 1), 4), 32)
    chunks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
    return chunks[::-1] if inputs.reverse else chunks


def _rows(values: Tensor, part: slice) -> Tensor:
    """(T, B, c): the tokens `part` of `values` (B, L, c), tokens first, so that one token's states lie together."""
    return values[:, part].transpose(0, 1)


def _dot(states: Tensor, vectors: Tensor, part: slice) -> Tensor:
    """(B, T, E): the products over N of `states` (T, B, E, N) with `vectors` (B, L, N) of the tokens `part`."""
    return (states @ _rows(vectors, part)[..., None])[..., 0].transpose(0, 1)


def _states(inputs: ScanInputs, decay: Tensor, drive: Tensor, part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
    """States after each token of `part` and their decays, (T, B, E, N) each, from the `state` before it."""
    decays = (_rows(decay, part)[..., None] * inputs.A).exp_()
    states = _rows(drive, part)[..., None] * _rows(inputs.B, part)[:, :, None]
    pairs = list(zip(states.unbind(0), decays.unbind(0), strict=True))
    for new, factor in reversed(pairs) if inputs.reverse else pairs:
        state = new.addcmul_(factor, state)
    return states, decays


def scan_gradients(grad: Tensor, inputs: ScanInputs) -> Gradients:
    """Gradients in the order of `Backend.scan_backward`; states are kept at chunk borders and recomputed between."""
    u, A, B, C, D, z = inputs.u, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z
    delta, decay = steps(inputs)
    drive = delta * u
    chunks = _chunks(inputs)
    last = 0 if inputs.reverse else -1  # of a chunk, in scan order
    borders = [u.new_zeros(u.shape[0], u.shape[2], A.shape[1])]
    for part in chunks[:-1]:
        borders.append(_states(inputs, decay, drive, part, borders[-1])[0][last].clone())
    gate = None if z is None else torch.sigmoid(z)
    through = grad if z is None or gate is None else grad * z * gate  # dL/dy before the gate
    y = torch.empty_like(u)
    d_drive, d_decay, d_A = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(A)
    d_B, d_C = torch.empty_like(B), torch.empty_like(C)
    carry = torch.zeros_like(borders[0])  # dL/dh that later chunks send back
    for part, border in zip(reversed(chunks), reversed(borders), strict=True):
        states, decays = _states(inputs, decay, drive, part, border)
        before = torch.cat((states[1:], border[None]) if inputs.reverse else (border[None], states[:-1]))
        d_h = _rows(through, part)[..., None] * _rows(C, part)[:, :, None]  # (T, B, E, N): what y_t sends to h_t
        pairs = list(zip(d_h.unbind(0), decays.unbind(0), strict=True))
        for d_state, factor in pairs if inputs.reverse else reversed(pairs):
            carry = d_state.add_(carry) * factor
        y[:, part] = _dot(states, C, part)
        d_drive[:, part] = _dot(d_h, B, part)
        d_C[:, part] = (_rows(through, part)[:, :, None] @ states)[:, :, 0].transpose(0, 1)
        d_B[:, part] = (_rows(drive, part)[:, :, None] @ d_h)[:, :, 0].transpose(0, 1)
        d_exponent = before.mul_(d_h).mul_(decays)
        d_decay[:, part] = (d_exponent * A).sum(dim=-1).transpose(0, 1)
        d_A += (d_exponent * _rows(decay, part)[..., None]).sum(dim=(0, 1))
    d_u, d_delta = d_drive * delta, d_drive * u + d_decay
    if D is not None:
        y, d_u = y + D * u, d_u + D * through
    d_gap_delta = None
    if inputs.gap is not None:
        if inputs.gap_delta is None:
            d_delta = d_delta + d_decay * inputs.gap[..., None]
        else:
            d_gap_delta = (d_decay * inputs.gap[..., None]).sum(dim=(0, 1))
    if inputs.delta_softplus:
        raw = inputs.delta if inputs.delta_bias is None else inputs.delta + inputs.delta_bias
        d_delta = d_delta * torch.sigmoid(raw)
    return (
        d_u,
        d_delta,
        d_A,
        d_B,
        d_C,
        None if D is None else (through * u).sum(dim=(0, 1)),
        None if z is None or gate is None else grad * y * gate * (1 + z * (1 - gate)),
        None if inputs.delta_bias is None else d_delta.sum(dim=(0, 1)),
        None if inputs.shift is None else d_decay,
        d_gap_delta,
    )


class PyTorchBackend(Backend):
    """Runs anywhere that PyTorch does, in any floating-point precision."""

    def __init__(self, name: str, scan: Callable[[ScanInputs], Tensor]) -> None:
        self.name = name
        self._scan = scan

    def missing(self) -> str | None:
        return None

    def accepts(self, example: Tensor, inner: int) -> bool:
        return example.is_floating_point()

    def scan(self, inputs: ScanInputs) -> Tensor:
        return self._scan(_widened(inputs)).to(inputs.u.dtype)

    def scan_backward(self, grad: Tensor, inputs: ScanInputs) -> Gradients:
        found = scan_gradients(wide(grad), _widened(inputs))
        given = (inputs.u, inputs.delta, inputs.A, inputs.B, inputs.C, inputs.D, inputs.z, inputs.delta_bias)
        return tuple(
            None if gradient is None or tensor is None else gradient.to(tensor.dtype)
            for gradient, tensor in zip(found, (*given, inputs.shift, inputs.gap_delta), strict=True)
        )


def _widened(inputs: ScanInputs) -> ScanInputs:
    """Every tensor in float32 at least."""
    values = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    widened: dict[str, Any] = {name: wide(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(inputs, **widened)


REFERENCE = PyTorchBackend("reference", reference_scan)
CHUNKED = PyTorchBackend("chunked", chunked_scan)
