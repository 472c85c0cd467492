"""MambaVision's two mixers, of tokens in one window: a scan beside a branch without one, and attention.

Written from the paper (arXiv 2407.08083) and the layout of its checkpoints; parameters have the authors' names.
Letters: B batch, L tokens now, M keys, d model width, E channels of the scan (d / 2), N state, R rank of the steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import Mixer, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import causal_conv1d, sparse_conv1d
from ssmprune_cli.models.common import channels_last_taps, decay_rates, inflow, some_outputs
from ssmprune_cli.models.mamba import StepProjection, centred_sources, s4d_real
from ssmprune_cli.tokens import TokenSequence, gather_tokens

D_CONV = 3


class DepthwiseTaps(nn.Module):
    """The weight of a depthwise convolution along the sequence. It has no bias, and looks one token ahead and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        bound = D_CONV**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, D_CONV).uniform_(-bound, bound))


class CentredMixer(nn.Module, Mixer):
    """Half of the channels are scanned forwards, and the other half stands beside the output of that scan. Both halves
    go through a convolution first."""

    directions = 1
    per_direction = ()

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        inner, rank = dim // 2, math.ceil(dim / 16)
        self.d_model, self.d_inner = dim, inner
        self.splits = [rank, d_state, d_state]
        self.in_proj = nn.Linear(dim, dim, bias=False)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = StepProjection(rank, inner)
        self.A_log = nn.Parameter(s4d_real(inner, d_state))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.conv1d_x = DepthwiseTaps(inner)
        self.conv1d_z = DepthwiseTaps(inner)

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence`, to (B, L, d) and what the scan did. `frozen` (B, F, d)
        and `context` (B, M, d) are the normalised tokens of `sequence.frozen` and `sequence.context`."""
        flow = inflow(sequence, self.in_proj(x), None if frozen is None else self.in_proj(frozen), alignment)
        sources = None if context is None else centred_sources(flow.convolved, D_CONV)
        convolved = self._convolve(flow.values, None if context is None else self.in_proj(context), sources)
        first, beside = convolved.chunk(2, dim=-1)  # (B, T, E) each, frozen tokens among them
        u, own = flow.pool(first)
        rank_values, b, c = self.x_proj(u).split(self.splits, dim=-1)
        raw_delta, bias = self.dt_proj(rank_values), 2 * self.dt_proj.bias  # the authors add it twice
        y = flow.scan(
            0,
            u,
            raw_delta,
            decay_rates(self.A_log),
            b,
            c,
            self.D,
            own=own,
            delta_bias=bias,
            gap=flow.scanned.gaps(reverse=False),
            size=flow.size,
            read=flow.read,
        )
        live = flow.read if flow.cells is None else flow.cells.live
        if live is not None:
            beside = gather_tokens(beside, live)
        deltas: tuple[Tensor, ...] = ()
        if wanted == "delta":
            delta = functional.softplus(raw_delta + bias)
            deltas = (delta if flow.read is None else gather_tokens(delta, flow.read),)
        mixed: Tensor = self.out_proj(torch.cat((y, beside.to(y.dtype)), dim=-1))
        return mixed, ScanStatistics((y,), deltas)

    def _convolve(self, values: Tensor, context: Tensor | None, sources: Tensor | None) -> Tensor:
        """silu(convolution) of values (B, T, d); of `context` (B, M, d) see kernels.sparse_conv1d."""
        taps = channels_last_taps(torch.cat((self.conv1d_x.weight, self.conv1d_z.weight)))  # (d, K)
        bias = taps.new_zeros(len(taps))
        if context is not None and sources is not None:
            return sparse_conv1d(values, context, sources, taps, bias)
        ahead = D_CONV // 2  # a causal convolution of the sequence that begins so much later
        return causal_conv1d(functional.pad(values, (0, 0, 0, ahead)), taps, bias)[:, ahead:]

    def null_delta(self) -> Tensor:
        """(1, E): step size of a zero token among zero tokens, of which the convolution leaves nothing."""
        return functional.softplus(2 * self.dt_proj.bias)[None]


class AttentionMixer(nn.Module, Mixer):
    """Attention among the live tokens and the frozen ones, which are only looked at.

    It has no state, so it needs no alignment. What stands for a scan's output in its statistics is the attended values,
    and for a token's step the attention that it receives.
    """

    directions = 1
    per_direction = ()

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.d_model = self.d_inner = dim
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        """As of CentredMixer. Frozen tokens that are pooled, and those of the context, have no part in it."""
        query, key, value = (self._by_head(each) for each in self.qkv(x).chunk(3, dim=-1))  # (B, h, L, d / h) each
        if frozen is not None and not sequence.pooled:
            more = some_outputs(self.qkv, frozen, slice(self.d_model, None))
            keys, values = (self._by_head(each) for each in more.chunk(2, dim=-1))
            key, value = torch.cat((key, keys), dim=2), torch.cat((value, values), dim=2)
        scores = query * (self.d_model // self.heads) ** -0.5 @ key.transpose(-2, -1)  # (B, h, L, M)
        shares = scores.softmax(dim=-1)
        attended = (shares @ value).transpose(1, 2).flatten(2)  # (B, L, d)
        deltas: tuple[Tensor, ...] = ()
        if wanted == "delta":
            received = shares.mean(dim=(1, 2))[:, : x.shape[1], None]  # (B, L, 1)
            deltas = (received.expand_as(attended),)
        mixed: Tensor = self.proj(attended)
        return mixed, ScanStatistics((attended,), deltas)

    def _by_head(self, values: Tensor) -> Tensor:
        """(B, M, d) to (B, h, M, d / h)."""
        heads: Tensor = values.unflatten(2, (self.heads, -1))
        return heads.transpose(1, 2)

    def null_delta(self) -> Tensor:
        """(1, d) zeros: a missing token changes no state."""
        return torch.zeros_like(self.proj.bias)[None]
