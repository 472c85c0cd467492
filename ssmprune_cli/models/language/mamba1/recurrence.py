"""The mixer of Mamba-1 as a recurrence. Letters: as in models/mamba/mixer.py, K width of the convolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import gated_sum, selective_scan
from ssmprune_cli.models.common import decay_rates, inflow
from ssmprune_cli.models.language.recurrence import MixerState, convolved, last_inputs, next_inputs
from ssmprune_cli.models.mamba import MambaMixer
from ssmprune_cli.tokens import TokenSequence, gather_tokens


class Mamba1Recurrence:
    """Of a mixer with one scan."""

    def __init__(self, mixer: MambaMixer) -> None:
        self.mixer = mixer

    def prefill(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics, MixerState]:
        mixer = self.mixer
        x, z = mixer.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        (branch,) = mixer.branches()
        flow = inflow(sequence, x, None if frozen is None else mixer.inner(frozen), alignment)
        projected = mixer.project(flow, None if context is None else mixer.inner(context), branch, reverse=False)
        u, own, raw_delta, b, c = projected
        bias = branch.dt_proj.bias
        gap, gap_delta, growth = flow.steps(0, own, flow.scanned.gaps(reverse=False), flow.size)
        if growth is not None:
            b = b * (1 + growth).to(b.dtype)[..., None]
        y, state = selective_scan(
            u,
            raw_delta,
            decay_rates(branch.A_log),
            b,
            c,
            branch.D if own is None else None,
            delta_bias=bias,
            gap=gap,
            gap_delta=gap_delta,
            read=flow.read,
            return_state=True,
        )
        if own is not None:
            y = torch.addcmul(y, own, branch.D.to(y.dtype))
        delta: tuple[Tensor, ...] = ()
        if wanted == "delta":
            step = functional.softplus(raw_delta + bias)
            delta = (step if flow.read is None else gather_tokens(step, flow.read),)
        mixed = mixer.out_proj(gated_sum((y,), z, mixer.scale))
        statistics = ScanStatistics((y,), delta)
        return mixed, statistics, MixerState(last_inputs(flow.values, mixer.d_conv), state)

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        mixer = self.mixer
        value, z = mixer.in_proj(x).chunk(2, dim=-1)  # (B, 1, E) each
        window = next_inputs(state, value)
        u = convolved(window, mixer.conv1d.weight, mixer.conv1d.bias)
        rank_values, b, c = mixer.x_proj(u).split(mixer.splits, dim=-1)
        delta = functional.softplus((mixer.dt_proj(rank_values) + mixer.dt_proj.bias).to(state.scan.dtype))
        decay = torch.exp(delta[:, 0, :, None] * decay_rates(mixer.A_log))  # (B, E, N)
        scan = decay * state.scan + (delta * u)[:, 0, :, None] * b
        y = (scan * c).sum(dim=-1)[:, None] + mixer.D * u  # (B, 1, E)
        out: Tensor = mixer.out_proj((y * functional.silu(z)).to(x.dtype))
        return out, MixerState(window[:, 1:], scan)
