"""The mixer of Mamba-2, from state-spaces/mamba e9594ce (mamba_ssm/modules/mamba2.py), with its parameter names.

Letters: B batch, L tokens, d model width, H heads, P channels of a head, E = H P inner channels, G groups, N state,
C = E + 2 G N channels that the convolution goes over: those of the scan, of B and of C.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import Mixer, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import ssd_scan
from ssmprune_cli.models.common import Inflow, decay_rates, inflow, some_outputs
from ssmprune_cli.models.mamba import CausalConv1d, conv_sources
from ssmprune_cli.tokens import TokenSequence, gather_tokens

NORM_EPS = 1e-5


class GatedNorm(nn.Module):
    """RMS norm of y silu(z), over each group of channels by itself."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Of y and z (B, L, E)."""
        gated = (y.float() if y.dtype != torch.float64 else y) * functional.silu(z)
        parts = gated.unflatten(-1, (self.groups, -1))  # (B, L, G, E / G)
        unit = parts * torch.rsqrt(parts.square().mean(dim=-1, keepdim=True) + NORM_EPS)
        normalised: Tensor = unit.flatten(-2).to(self.weight.dtype) * self.weight
        return normalised


class Mamba2Mixer(nn.Module, Mixer):
    """One causal scan; a head has one decay rate and one step. `ScanStatistics.delta` and gap steps are one a head."""

    directions = 1
    per_direction: tuple[str, ...] = ()

    def __init__(self, dim: int, *, heads: int, head_dim: int, groups: int, d_state: int, d_conv: int) -> None:
        super().__init__()
        self.d_model, self.d_inner = dim, heads * head_dim
        self.heads, self.groups, self.d_state, self.d_conv = heads, groups, d_state, d_conv
        self.channels = self.d_inner + 2 * groups * d_state
        self.in_proj = nn.Linear(dim, self.d_inner + self.channels + heads, bias=False)  # z, then x, B, C, then dt
        self.conv1d = CausalConv1d(self.channels, d_conv)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = GatedNorm(self.d_inner, groups)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False)
        if not self.A_log.is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """As the authors: A uniform from 1 to 16, steps log-uniform from 0.001 to 0.1."""
        self.A_log.uniform_(1, 16).log_()
        low, high = math.log(0.001), math.log(0.1)
        step = torch.exp(torch.rand(self.heads) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]:
        """See `BranchMixer.forward`."""
        z, values = self.in_proj(x).split([self.d_inner, self.channels + self.heads], dim=-1)
        statistics, _, _ = self.scanned(values, sequence, alignment, wanted, frozen, context)
        mixed: Tensor = self.out_proj(self.norm(statistics.y[0], z))
        return mixed, statistics

    def scanned(
        self,
        values: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[ScanStatistics, Inflow, Tensor]:
        """Of `values` (B, L, C + H), projected: y (B, L, E) and, if wanted, steps (B, L, H); what flowed in; and the
        state (B, H, P, N) after the last token."""
        if frozen is not None:
            frozen = some_outputs(self.in_proj, frozen, slice(self.d_inner, None))  # (B, F, C + H)
        flow = inflow(sequence, values, frozen, alignment)
        sources = None
        if context is not None:
            context = some_outputs(self.in_proj, context, slice(self.d_inner, -self.heads))  # (B, M, C)
            sources = conv_sources(flow.convolved, self.d_conv)[0]
        inner, dt = flow.values.split([self.channels, self.heads], dim=-1)
        seen = self.conv1d(inner.contiguous(), context=context, sources=sources)
        steps, own = flow.pool(torch.cat((seen, dt), dim=-1))
        u, b, c, dt = self.divide(steps)
        gap, gap_delta, growth = flow.steps(0, own, flow.scanned.gaps(reverse=False), flow.size)
        if growth is not None:
            b = b * (1 + growth).to(b.dtype)[..., None, None]
        y, state = ssd_scan(
            u,
            dt,
            decay_rates(self.A_log),
            b,
            c,
            self.D if own is None else None,
            dt_bias=self.dt_bias,
            gap=gap,
            gap_delta=gap_delta,
        )
        if flow.read is not None:
            y = gather_tokens(y.flatten(2), flow.read).unflatten(2, (self.heads, -1))
        if own is not None:
            y = y + self.divide(own)[0] * self.D.to(y.dtype)[:, None]
        delta: tuple[Tensor, ...] = ()
        if wanted == "delta":
            step = functional.softplus(dt + self.dt_bias)
            delta = (step if flow.read is None else gather_tokens(step, flow.read),)
        return ScanStatistics((y.flatten(2),), delta), flow, state

    def divide(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of (B, S, C + H), convolved: u (B, S, H, P), B and C (B, S, G, N) and raw steps (B, S, H)."""
        states = self.groups * self.d_state
        u, b, c, dt = values.split([self.d_inner, states, states, self.heads], dim=-1)
        by_group = (self.groups, self.d_state)
        return u.unflatten(-1, (self.heads, -1)), b.unflatten(-1, by_group), c.unflatten(-1, by_group), dt

    @property
    def num_steps(self) -> int:
        return self.heads

    def null_delta(self) -> Tensor:
        """(1, H): the step of a zero token."""
        return functional.softplus(self.dt_bias)[None]
