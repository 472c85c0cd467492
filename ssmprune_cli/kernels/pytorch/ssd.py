"""Mamba-2's scan in plain PyTorch: `reference_ssd`, token by token, the truth; `chunked_ssd`, made of matrix products.

Written from the paper (Dao and Gu 2024, "Transformers are SSMs", sections 3 and 6). A head has one rate of decay. Its
scan within a chunk of tokens is therefore a masked matrix: y = (M * C B^T) (dt x), where M[t, s] is the decay from s to
t. States are carried from chunk to chunk.

Glossary: B batch, L tokens, H heads, P channels of a head, G groups of heads that share B and C, R heads of a group, N
state size, K chunks, Q tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.inputs import Gradients, SsdInputs

SSD_CHUNK = 64  # Q: the products within a chunk then cost about as much as those with states
DECAYS = 1 << 20  # entries of the masks worked on at once: a few tensors of this size fit into a cache


def ssd_steps(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """(B, L, H) each: the step size of every token and head, and its decay time, the step plus what alignment adds."""
    dt = inputs.dt if inputs.dt_bias is None else inputs.dt + inputs.dt_bias
    if inputs.dt_softplus:
        dt = functional.softplus(dt)
    if inputs.shift is not None:
        return dt, dt + inputs.shift
    if inputs.gap is not None:
        return dt, dt + inputs.gap[..., None] * (dt if inputs.gap_delta is None else inputs.gap_delta)
    return dt, dt


def start_of(inputs: SsdInputs) -> Tensor:
    """(B, H, P, N): the state before the first token."""
    batch, _, heads, width = inputs.x.shape
    zeros = inputs.x.new_zeros(batch, heads, width, inputs.B.shape[3])
    return zeros if inputs.initial_state is None else zeros + inputs.initial_state


def reference_ssd(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t A) h_{t-1} + dt_t x_t B_t^T; y_t = h_t C_t + D x_t, token by token; and the last h."""
    x, D = inputs.x, inputs.D
    dt, decay = ssd_steps(inputs)
    shared = x.shape[2] // inputs.B.shape[2]
    B, C = (each.repeat_interleave(shared, dim=2) for each in (inputs.B, inputs.C))  # (B, L, H, N)
    factors, drive = torch.exp(decay * inputs.A), dt[..., None] * x
    state, ys = start_of(inputs), []
    for t in range(x.shape[1]):
        state = factors[:, t, :, None, None] * state + drive[:, t, :, :, None] * B[:, t, :, None]
        ys.append((state @ C[:, t, :, :, None])[..., 0])
    y = torch.stack(ys, dim=1) if ys else torch.zeros_like(x)
    return y if D is None else y + D[:, None] * x, state


def chunked_ssd(inputs: SsdInputs) -> tuple[Tensor, Tensor]:
    """As `reference_ssd`, with matrix products in and between chunks; one exponential a head and token."""
    y, state = torch.empty_like(inputs.x), start_of(inputs)
    dt, decay = ssd_steps(inputs)
    for tokens, chunk in _segments(inputs.x):
        part = _Part(inputs, dt, decay, tokens, chunk)
        befores, state = part.walk(state)
        out = part.grouped(y[:, tokens])
        inside = part.decays.mul_(part.scores[:, :, :, None])  # what token t reads of token s, at [t, s]
        torch.addcmul(inside @ part.drive(), part.before[..., None], part.read(befores), out=out)
        if inputs.D is not None:
            out.addcmul_(inputs.D.view(part.heads)[..., None, None], part.x)
    return y, state.clone()  # and not all states of the last segment with it


def _segments(x: Tensor) -> list[tuple[slice, int]]:
    """Ranges of tokens that are worked on at once, and the tokens of their chunks: a last one may be shorter."""
    batch, length, heads, _ = x.shape
    most = max(DECAYS // max(batch * heads * SSD_CHUNK * SSD_CHUNK, 1), 1) * SSD_CHUNK
    whole = length - length % SSD_CHUNK
    segments = [(slice(start, min(start + most, whole)), SSD_CHUNK) for start in range(0, whole, most)]
    return segments if whole == length else [*segments, (slice(whole, length), length - whole)]


class _Part:
    """A segment of K chunks of Q tokens: what it is made of, per group and per head.

    steps, times   (B, K, G, R, Q): step sizes and decay times
    x              (B, K, G, R, Q, P)
    B, C           (B, K, G, Q, N)
    decays         (B, K, G, R, Q, Q): from token s to token t, at [t, s]; 0 for t < s
    scores         (B, K, G, Q, Q): C_t . B_s at [t, s]
    before, after  (B, K, G, R, Q): decay from the start of the chunk through each token, and from each token to its end
    """

    def __init__(self, inputs: SsdInputs, dt: Tensor, decay: Tensor, tokens: slice, chunk: int) -> None:
        heads, groups = inputs.x.shape[2], inputs.B.shape[2]
        self._cut, self.heads = (-1, chunk), (groups, heads // groups)
        self.steps, self.times, self.x = (self.grouped(each[:, tokens]) for each in (dt, decay, inputs.x))
        self.B, self.C = (each[:, tokens].unflatten(1, self._cut).transpose(2, 3) for each in (inputs.B, inputs.C))
        factors = torch.exp(self.times * inputs.A.view(self.heads)[..., None])
        self.decays, self.before, self.after = _decays(factors)
        self.scores = self.C @ self.B.mT

    def grouped(self, tensor: Tensor) -> Tensor:
        """(B, K Q, H, ...) as (B, K, G, R, Q, ...)."""
        cut: Tensor = tensor.unflatten(1, self._cut).unflatten(3, self.heads)
        return cut.movedim(2, 4)

    def ungrouped(self, tensor: Tensor) -> Tensor:
        """(B, K, G, R, Q, ...) as (B, K Q, H, ...)."""
        return tensor.movedim(4, 2).flatten(1, 2).flatten(2, 3)

    def drive(self) -> Tensor:
        """(B, K, G, R, Q, P): step times input, each head's dense, as its matrix products want it."""
        return torch.mul(self.steps[..., None], self.x, out=self.x.new_empty(self.x.shape))

    def fed(self) -> Tensor:
        """(B, K, G, Q, R P): what tokens put into the state after their chunks, times B."""
        return _columns(self.x * (self.steps * self.after)[..., None])

    def walk(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """States before each chunk (B, K, G, R, P, N), and (B, H, P, N) after the last, from the `state` before."""
        added = (self.fed().mT @ self.B).unflatten(3, (self.heads[1], -1))  # (B, K, G, R, P, N)
        batch, count, *sizes = added.shape
        states = added.new_empty(batch, count + 1, *sizes)
        states[:, 0] = state.unflatten(1, self.heads)
        for k in range(count):
            factor = self.before[:, k, :, :, -1, None, None]
            torch.addcmul(added[:, k], factor, states[:, k], out=states[:, k + 1])
        return states[:, :-1], states[:, -1].flatten(1, 2)

    def read(self, befores: Tensor) -> Tensor:
        """(B, K, G, R, Q, P): what tokens read of the states before their chunks, but for the decay."""
        return _heads_first(self.C @ befores.flatten(3, 4).mT, befores)


def _decays(factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decays from token s to token t, at [..., t, s] and 0 for t < s; from the start through each token; and from each
    token to the end; of the tokens' own `factors` (..., Q).

    Products are exact however long a token's decay, where differences of summed exponents would not be. They are made
    for blocks of tokens, which double: the corner of two neighbours is what comes after a token of the first, times
    what comes before the end of one of the second.
    """
    size = factors.shape[-1]
    whole = 1 << (size - 1).bit_length()
    before = functional.pad(factors, (0, whole - size), value=1.0)
    after, decays = torch.ones_like(before), before.new_zeros(*before.shape, whole)
    decays.diagonal(dim1=-2, dim2=-1).fill_(1)
    # What is left of a token then counts as nothing, 1e-15 in float32: products would soon be denormal numbers, which
    # take processors a hundred times as long.
    least = torch.finfo(factors.dtype).tiny ** 0.4
    half = 1
    while half < whole:
        before, after = before.unflatten(-1, (-1, 2, half)), after.unflatten(-1, (-1, 2, half))
        blocks = decays.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))
        corners = blocks.diagonal(dim1=-6, dim2=-3)[..., 1, :, 0, :, :]  # (..., half, half, whole / (2 half))
        torch.mul(before[..., 1, :].mT[..., :, None, :], after[..., 0, :].mT[..., None, :, :], out=corners)
        early, late = before[..., 0, -1:], before[..., 1, -1:]  # of whole blocks
        before = torch.stack((before[..., 0, :], before[..., 1, :] * early), dim=-2).flatten(-3)
        after = torch.stack((after[..., 0, :] * late, after[..., 1, :]), dim=-2).flatten(-3)
        before, after = functional.threshold(before, least, 0.0), functional.threshold(after, least, 0.0)
        half *= 2
    return decays[..., :size, :size], before[..., :size], after[..., :size]


def _columns(tensor: Tensor) -> Tensor:
    """(B, K, G, R, Q, P) as (B, K, G, Q, R P): all heads of a group side by side."""
    return tensor.transpose(3, 4).flatten(4)


def _heads_first(tensor: Tensor, states: Tensor) -> Tensor:
    """(B, K, G, Q, R P) as (B, K, G, R, Q, P)."""
    heads: Tensor = tensor.unflatten(4, states.shape[3:5])
    return heads.transpose(3, 4)


def ssd_gradients(grad: Tensor, inputs: SsdInputs, d_last: Tensor | None) -> Gradients:
    """Gradients in the order of `SSD_GRADIENTS`; states are kept between segments, all else is computed again."""
    x, A = inputs.x, inputs.A
    dt, decay = ssd_steps(inputs)
    segments, state, starts = _segments(x), start_of(inputs), []
    for tokens, chunk in segments:
        starts.append(state)
        if len(starts) < len(segments):
            _, state = _Part(inputs, dt, decay, tokens, chunk).walk(state)
    carry = torch.zeros_like(state) if d_last is None else d_last  # dL/dstate after the segment
    d_drive, d_step, d_decay = torch.empty_like(x), torch.empty_like(dt), torch.empty_like(dt)
    d_B, d_C, d_A = torch.empty_like(inputs.B), torch.empty_like(inputs.C), torch.zeros_like(A)
    for (tokens, chunk), start in zip(reversed(segments), reversed(starts), strict=True):
        part = _Part(inputs, dt, decay, tokens, chunk)
        through = part.grouped(grad[:, tokens])  # (B, K, G, R, Q, P)
        found, carry = _segment_gradients(part, through, start, carry)
        d_drive[:, tokens], d_exponent = part.ungrouped(found[0]), part.ungrouped(found[1])
        d_B[:, tokens], d_C[:, tokens] = (each.transpose(2, 3).flatten(1, 2) for each in found[2:])
        d_A += (d_exponent * decay[:, tokens]).sum(dim=(0, 1))
        d_decay[:, tokens] = d_exponent * A
    d_x = d_drive * dt[..., None]
    d_step = (d_drive * x).sum(dim=-1) + d_decay
    d_gap_delta = None
    if inputs.gap is not None and inputs.gap_delta is None:
        d_step = d_step + d_decay * inputs.gap[..., None]
    elif inputs.gap is not None:
        d_gap_delta = (d_decay * inputs.gap[..., None]).sum(dim=(0, 1))
    if inputs.dt_softplus:
        d_step = d_step * torch.sigmoid(inputs.dt if inputs.dt_bias is None else inputs.dt + inputs.dt_bias)
    return (
        d_x if inputs.D is None else d_x + inputs.D[:, None] * grad,
        d_step,
        d_A,
        d_B,
        d_C,
        None if inputs.D is None else (grad * x).sum(dim=(0, 1, 3)),
        None if inputs.dt_bias is None else d_step.sum(dim=(0, 1)),
        None if inputs.shift is None else d_decay,
        d_gap_delta,
        None if inputs.initial_state is None else carry,
    )


def _segment_gradients(
    part: _Part, through: Tensor, start: Tensor, carry: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Gradients of the drive (B, K, G, R, Q, P), of each token's exponent (B, K, G, R, Q), of B and C (B, K, G, Q, N);
    and dL/dstate before the segment, from `carry` after it.

    through  (B, K, G, R, Q, P): dL/dy
    """
    befores, _ = part.walk(start)
    drive = part.drive()
    paths = (through @ drive.mT).mul_(part.decays)  # (B, K, G, R, Q, Q): dL/d(what t reads of s), but for the score
    d_scores = paths.sum(dim=3)
    d_drive = (part.decays * part.scores[:, :, :, None]).mT @ through
    # Between chunks, backwards.
    heard = _columns(part.before[..., None] * through)  # (B, K, G, Q, R P)
    sent = (heard.mT @ part.C).view_as(befores).unbind(1)
    state, afters = carry.view_as(befores[:, 0]), []
    for own, factor in zip(reversed(sent), reversed(part.before.unbind(1)), strict=True):
        afters.append(state)
        state = torch.addcmul(own, factor[..., -1, None, None], state)
    d_states = torch.stack(afters[::-1], dim=1)  # (B, K, G, R, P, N): dL/dstate after each chunk
    d_fed = part.after[..., None] * _heads_first(part.B @ d_states.flatten(3, 4).mT, d_states)
    d_C = d_scores @ part.B + heard @ befores.flatten(3, 4)
    d_B = d_scores.mT @ part.C + part.fed() @ d_states.flatten(3, 4)
    # A token's exponent is in the decays of every path across it: from s before it to t from it on, ...
    from_on = torch.ones_like(part.scores[0, 0, 0]).triu_()  # [i, t]
    across = from_on @ paths.mul_(part.scores[:, :, :, None]).tril_(-1)
    d_exponent = across.tril_(-1).sum(dim=-1)
    # ... from the state before the chunk to t, from s to the state after it, and from the one to the other.
    d_before = (through * part.read(befores)).sum(dim=-1)
    d_exponent += (part.before * d_before).flip(-1).cumsum(-1).flip(-1)
    d_exponent[..., 1:] += (drive * d_fed).sum(dim=-1).cumsum(-1)[..., :-1]
    d_exponent += part.before[..., -1:] * (d_states * befores).sum(dim=(-1, -2))[..., None]
    return (d_drive + d_fed, d_exponent, d_B, d_C), state.flatten(1, 2)
