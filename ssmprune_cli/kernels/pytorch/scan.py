"""The scan in plain PyTorch: `reference_scan`, step by step, the truth; `chunked_scan`, the same in fewer, larger
operations.

Both compute in the activations' precision, float32 at least, and share the backward pass, which recomputes the states
chunk by chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.inputs import Gradients, ScanInputs

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


def reference_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t A) h_{t-1} + delta_t B_t u_t; y_t = C_t . h_t, token by token; and the last h, (B, E, N)."""
    delta, decay = steps(inputs)
    batch, length, channels = inputs.u.shape
    state = inputs.u.new_zeros(batch, channels, inputs.A.shape[1])
    if inputs.initial_state is not None:
        state = state + inputs.initial_state
    outputs: list[Tensor] = [inputs.u] * length
    for t in reversed(range(length)) if inputs.reverse else range(length):
        drive = (delta[:, t] * inputs.u[:, t])[..., None] * inputs.B[:, t, None]  # (B, E, N)
        state = torch.exp(decay[:, t, :, None] * inputs.A) * state + drive
        outputs[t] = (state * inputs.C[:, t, None]).sum(dim=-1)
    y = torch.stack(outputs, dim=1) if length else torch.zeros_like(inputs.u)
    return finish(y, inputs), state


def chunked_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """As `reference_scan`, with decays, drives and read-outs of several tokens in one operation each.

    A state is (N, E) here, so that neighbouring channels lie together and a read-out is a product of matrices.
    """
    delta, decay = steps(inputs)
    walk = _Walk(inputs, decay, delta * inputs.u)
    y = torch.empty_like(inputs.u)
    state = walk.start(inputs.initial_state)
    for part in walk.chunks:
        states, _ = walk.states(part, state)
        state = states[:, walk.last]
        y[:, part] = _over_states(inputs.C[:, part], states)
    return finish(y, inputs), state.transpose(1, 2).contiguous()


def _over_states(vectors: Tensor, states: Tensor) -> Tensor:
    """(B, T, E): the products over N of `vectors` (B, T, N) with `states` (B, T, N, E)."""
    return (vectors[:, :, None] @ states)[:, :, 0]


def _over_channels(states: Tensor, values: Tensor) -> Tensor:
    """(B, T, N): the products over E of `states` (B, T, N, E) with `values` (B, T, E)."""
    return (states @ values[..., None])[..., 0]


class _Walk:
    """The states of a scan, chunk by chunk.

    decay, drive  (B, L, E): decay times, and step times input
    chunks        token ranges in scan order: few tokens of large batches, and more of small ones
    last          place of a chunk's last token, in scan order
    """

    def __init__(self, inputs: ScanInputs, decay: Tensor, drive: Tensor) -> None:
        self.decay, self.drive, self.B = decay, drive, inputs.B
        self.rates = inputs.A.t().contiguous()  # (N, E)
        self.reverse, self.last = inputs.reverse, 0 if inputs.reverse else -1
        batch, length, _ = drive.shape
        size = min(max(CHUNK_VALUES // max(batch * self.rates.numel(), 1), 4), 32)
        chunks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        self.chunks = chunks[::-1] if self.reverse else chunks

    def start(self, state: Tensor | None) -> Tensor:
        """(B, N, E): `state` (B, E, N), or zeros."""
        zeros = self.rates.new_zeros(len(self.drive), *self.rates.shape)
        return zeros if state is None else zeros + state.transpose(1, 2)

    def states(self, part: slice, state: Tensor) -> tuple[Tensor, Tensor]:
        """States after each token of `part` and their decays, (B, T, N, E) each, from the `state` before it."""
        decays = (self.decay[:, part, None] * self.rates).exp_()
        states = self.drive[:, part, None] * self.B[:, part, :, None]
        for new, factor in self.steps(states, decays):
            state = new.addcmul_(factor, state)
        return states, decays

    def steps(self, *of_chunk: Tensor, back: bool = False) -> list[tuple[Tensor, ...]]:
        """The parts of (B, T, ...) tensors that belong to one token, token by token in scan order, or `back`."""
        tokens = list(zip(*(each.unbind(1) for each in of_chunk), strict=True))
        return tokens[::-1] if self.reverse != back else tokens


def scan_gradients(grad: Tensor, inputs: ScanInputs, d_last: Tensor | None) -> Gradients:
    """Gradients in the order of `Backend.scan_backward`; states are kept at chunk borders and recomputed between."""
    u, B, C, D, z = inputs.u, inputs.B, inputs.C, inputs.D, inputs.z
    delta, decay = steps(inputs)
    walk = _Walk(inputs, decay, delta * u)
    borders = [walk.start(inputs.initial_state)]
    for part in walk.chunks[:-1]:
        borders.append(walk.states(part, borders[-1])[0][:, walk.last].clone())
    gate = None if z is None else torch.sigmoid(z)
    through = grad if z is None or gate is None else grad * z * gate  # dL/dy before the gate
    y, d_drive, d_decay = (torch.empty_like(u) for _ in range(3))
    d_B, d_C, d_rates = torch.empty_like(B), torch.empty_like(C), torch.zeros_like(walk.rates)
    carry = walk.start(d_last)  # dL/dh that later chunks send back
    for part, border in zip(reversed(walk.chunks), reversed(borders[: len(walk.chunks)]), strict=True):
        states, decays = walk.states(part, border)
        first, rest = border[:, None], states[:, 1:] if inputs.reverse else states[:, :-1]
        before = torch.cat((rest, first) if inputs.reverse else (first, rest), dim=1)
        d_h = through[:, part, None] * C[:, part, :, None]  # (B, T, N, E): what y_t sends to h_t
        for d_state, factor in walk.steps(d_h, decays, back=True):
            carry = d_state.add_(carry) * factor
        y[:, part] = _over_states(C[:, part], states)
        d_drive[:, part] = _over_states(B[:, part], d_h)
        d_C[:, part] = _over_channels(states, through[:, part])
        d_B[:, part] = _over_channels(d_h, walk.drive[:, part])
        d_exponent = before.mul_(d_h).mul_(decays)
        d_rates += (d_exponent * decay[:, part, None]).sum(dim=(0, 1))
        d_decay[:, part] = d_exponent.mul_(walk.rates).sum(dim=2)
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
        d_rates.t(),
        d_B,
        d_C,
        None if D is None else (through * u).sum(dim=(0, 1)),
        None if z is None or gate is None else grad * y * gate * (1 + z * (1 - gate)),
        None if inputs.delta_bias is None else d_delta.sum(dim=(0, 1)),
        None if inputs.shift is None else d_decay,
        d_gap_delta,
        None if inputs.initial_state is None else carry.transpose(1, 2),
    )
