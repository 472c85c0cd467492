"""The Mamba mixer and block of Vim, VideoMamba and Mamba-Reg: one scan, or one in each direction.

Written from state-spaces/mamba and hustvl/Vim dd0358a (mamba-1p1p1/mamba_ssm/modules/mamba_simple.py), with their
parameter names. Letters: B batch, L tokens, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.kernels import causal_conv1d, selective_scan
from ssmprune_cli.models.layers import RMSNorm
from ssmprune_cli.tokens import ScanAlignment, ScanStatistics, TokenSequence

MixerKind = Literal["v2", "v1", "none"]


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with SiLU over (B, L, E); `reverse` looks at later tokens, not earlier ones."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5  # nn.Conv1d's own initialisation, which the authors leave as it is
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor, *, reverse: bool = False) -> Tensor:
        return causal_conv1d(x, self.weight[:, 0], self.bias, reverse=reverse)


class StepProjection(nn.Linear):
    """R channels to raw step sizes of E channels. The bias is left to the scan, which adds it before the softplus."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__(rank, channels)
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        # Steps start log-uniform between 0.001 and 0.1: the bias is the inverse softplus of such a step.
        low, high = math.log(0.001), math.log(0.1)
        step = torch.exp(torch.rand(channels) * (high - low) + low).clamp(min=1e-4)
        with torch.no_grad():
            self.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, rank_values: Tensor) -> Tensor:
        return functional.linear(rank_values, self.weight)


class MambaMixer(nn.Module):
    """Implements `tokens.Mixer`.

    kind   "v2": a branch of its own for each direction. "v1": both directions share the (forward) convolution, the
           projections and D, and have their own A. "none": forward only.
    halve  divide the sum of both directions by two before the output projection (v2 only)
    gamma  start of the layer scale, None for none
    """

    def __init__(
        self,
        dim: int,
        *,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        kind: MixerKind,
        halve: bool,
        gamma: float | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.halve = halve and kind == "v2"
        self.d_inner = d_inner
        self.directions = 1 if kind == "none" else 2
        self.per_direction: tuple[str, ...] = ()
        self.splits = [dt_rank, d_state, d_state]
        self.gamma = None if gamma is None else nn.Parameter(torch.full((dim,), gamma))
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False)
        if kind == "v2":
            parts = ("conv1d", "x_proj", "dt_proj")
            self.per_direction = (*parts, *(f"{part}_b" for part in parts))
        for suffix in ("", "_b") if kind == "v2" else ("",):
            self.add_module(f"conv1d{suffix}", CausalConv1d(d_inner, d_conv))
            self.add_module(f"x_proj{suffix}", nn.Linear(d_inner, sum(self.splits), bias=False))
            self.add_module(f"dt_proj{suffix}", StepProjection(dt_rank, d_inner))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(d_inner)))
        real = torch.arange(1, d_state + 1).float().log().repeat(d_inner, 1)  # S4D-Real: A = -1, -2, ... -N
        self.A_log = nn.Parameter(real)
        if self.directions == 2:
            self.A_b_log = nn.Parameter(real.clone())
        self.out_proj = nn.Linear(d_inner, dim, bias=False)

    def forward(
        self, x: Tensor, sequence: TokenSequence, alignment: ScanAlignment | None, want_delta: bool
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence`, to (B, L, d) and what the scans did.

        With `alignment`, each scan decays over the tokens that `sequence` has lost.
        """
        values, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        outputs, deltas = [], []
        branch = self._project(values, "", reverse=False)
        for direction in range(self.directions):
            reverse, suffix = direction == 1, ""
            if reverse and self.kind == "v2":
                suffix = "_b"
                branch = self._project(values, suffix, reverse=True)
            u, raw_delta, b, c = branch
            bias = getattr(self, f"dt_proj{suffix}").bias
            y = selective_scan(
                u,
                raw_delta,
                -torch.exp(self.A_b_log if reverse else self.A_log),
                b,
                c,
                getattr(self, f"D{suffix}"),
                delta_bias=bias,
                gap=None if alignment is None else sequence.gaps(reverse=reverse),
                gap_delta=None if alignment is None else alignment.gap_delta[direction],
                reverse=reverse,
            )
            outputs.append(y)
            if want_delta:
                deltas.append(functional.softplus(raw_delta + bias))
        mixed = outputs[0] if self.directions == 1 else outputs[0] + outputs[1]
        mixed = mixed * functional.silu(gate)
        if self.halve:
            mixed = mixed / 2
        projected: Tensor = self.out_proj(mixed)
        if self.gamma is not None:
            projected = projected * self.gamma
        return projected, ScanStatistics(tuple(outputs), tuple(deltas))

    def _project(self, values: Tensor, suffix: str, *, reverse: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Input u (B, L, E), raw step sizes (B, L, E) without bias, B and C (B, L, N) of one branch."""
        u = getattr(self, f"conv1d{suffix}")(values, reverse=reverse)
        rank_values, b, c = getattr(self, f"x_proj{suffix}")(u).split(self.splits, dim=-1)
        return u, getattr(self, f"dt_proj{suffix}")(rank_values), b, c

    def null_delta(self) -> Tensor:
        """(directions, E): step size of a zero token among zero tokens, of which the convolution leaves its bias."""
        steps = []
        for suffix in ("", "_b") if self.kind == "v2" else ("",) * self.directions:
            u = functional.silu(getattr(self, f"conv1d{suffix}").bias)
            rank_values = getattr(self, f"x_proj{suffix}")(u)[: self.splits[0]]
            step_projection = getattr(self, f"dt_proj{suffix}")
            steps.append(functional.softplus(step_projection(rank_values) + step_projection.bias))
        return torch.stack(steps)


class MambaBlock(nn.Module):
    """Add the last output to the residual stream, normalise, mix. The stream is in float32 at least, as upstream."""

    def __init__(self, norm: nn.LayerNorm | RMSNorm, mixer: MambaMixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, want_delta: bool
    ) -> tuple[TokenSequence, ScanStatistics]:
        stream = residual_stream(sequence)
        normalised = self.norm(stream.to(self.norm.weight.dtype))
        hidden, statistics = self.mixer(normalised, sequence, alignment, want_delta)
        return replace(sequence, hidden=hidden, residual=stream), statistics


def residual_stream(sequence: TokenSequence) -> Tensor:
    """(B, L, d): the residual stream with the last block's output added to it."""
    stream = sequence.hidden if sequence.residual is None else sequence.residual + sequence.hidden
    return stream.to(torch.promote_types(stream.dtype, torch.float32))


def init_output_projection(projection: nn.Linear, depth: int) -> None:
    """Kaiming uniform over the square root of the depth, as GPT-2 does: the residual stream adds up `depth` outputs."""
    nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
    with torch.no_grad():
        projection.weight /= math.sqrt(depth)
