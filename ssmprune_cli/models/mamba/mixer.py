"""The Mamba mixer of Vim, VideoMamba and Mamba-Reg: one scan, or one in each direction.

Written from state-spaces/mamba and hustvl/Vim dd0358a (mamba-1p1p1/mamba_ssm/modules/mamba_simple.py), with their
parameter names. Letters: B batch, L tokens, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import Mixer, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import causal_conv1d, gated_sum, sparse_conv1d
from ssmprune_cli.models.common import (
    Inflow,
    channels_last_taps,
    decay_rates,
    inflow,
    some_outputs,
)
from ssmprune_cli.models.mamba.causal_sources import conv_sources
from ssmprune_cli.tokens import TokenSequence, gather_tokens

MixerKind = Literal["v2", "v1", "none"]


class CausalConv1d(nn.Module):
    """Depthwise causal convolution with SiLU over (B, L, E); `reverse` looks at later tokens, not earlier ones."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        bound = width**-0.5  # nn.Conv1d's own initialisation, which the authors leave as it is
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(
        self, x: Tensor, *, reverse: bool = False, context: Tensor | None = None, sources: Tensor | None = None
    ) -> Tensor:
        """With `context` (B, M, E) too, taps meet the rows `sources` of both: see kernels.sparse_conv1d."""
        taps = channels_last_taps(self.weight)  # (E, K)
        if context is None or sources is None:
            return causal_conv1d(x, taps, self.bias, reverse=reverse)
        return sparse_conv1d(x, context, sources, taps, self.bias)


def s4d_real(channels: int, d_state: int) -> Tensor:
    """Start of A_log (E, N): A = -1, -2, ... -N in every channel.

    A model about to be loaded is built on the meta device. Arithmetic there would import torch's compiler, for two
    seconds, and there is nothing to compute.
    """
    A_log = torch.empty(channels, d_state)
    if not A_log.is_meta:
        A_log.copy_(torch.arange(1, d_state + 1).float().log())
    return A_log


class StepProjection(nn.Linear):
    """R channels to raw step sizes of E channels. The bias is left to the scan, which adds it before the softplus."""

    def __init__(self, rank: int, channels: int) -> None:
        super().__init__(rank, channels)
        nn.init.uniform_(self.weight, -(rank**-0.5), rank**-0.5)
        if self.bias.is_meta:
            return  # see s4d_real
        # Steps start log-uniform between 0.001 and 0.1: the bias is the inverse softplus of such a step.
        low, high = math.log(0.001), math.log(0.1)
        step = torch.exp(torch.rand(channels) * (high - low) + low).clamp(min=1e-4)
        with torch.no_grad():
            self.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def forward(self, rank_values: Tensor) -> Tensor:
        return functional.linear(rank_values, self.weight)


class Branch(NamedTuple):
    """The layers and parameters of one scan direction."""

    conv1d: CausalConv1d
    x_proj: nn.Linear
    dt_proj: StepProjection
    A_log: Tensor
    D: Tensor


class SequenceMixer(Mixer, Protocol):
    """The mixer of a MambaBlock: see `BranchMixer.forward`."""

    out_proj: nn.Linear

    def __call__(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]: ...


class BranchMixer(nn.Module, Mixer):
    """What mixers of Mamba blocks have in common: a projection in, branches of scans, and a projection out.

    splits  channels of `x_proj`: R of the step, N of B and N of C
    gamma   layer scale (d,), or None
    """

    d_conv: int
    splits: list[int]
    gamma: nn.Parameter | None
    in_proj: nn.Linear
    out_proj: nn.Linear

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence`, to (B, L, d) and what the scans did.

        With `alignment`, each scan makes up for the tokens that `sequence` has lost. `frozen` (B, F, d) and `context`
        (B, M, d) are the normalised tokens of `sequence.frozen` and `sequence.context`: the first get no more than what
        the scans need of them, the second than what the convolutions need.
        """
        xz = self.in_proj(x)  # (B, L, 2E)
        if frozen is not None:
            frozen = self.inner(frozen)
        if context is not None:
            context = self.inner(context)
        mixed, statistics = self.mix(xz, sequence, alignment, wanted, frozen, context)
        projected: Tensor = self.out_proj(mixed)
        if self.gamma is not None:
            projected = projected * self.gamma
        return projected, statistics

    @abstractmethod
    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        """All between the two projections: xz (B, L, 2E), frozen (B, F, E) and context (B, M, E) to (B, L, E)."""

    @abstractmethod
    def branches(self) -> list[Branch]:
        """One for each direction."""

    def inner(self, x: Tensor) -> Tensor:
        """The half of the input projection that feeds the scans: (B, M, d) to (B, M, E)."""
        return some_outputs(self.in_proj, x, slice(self.d_inner))

    def project(
        self, flow: Inflow, context: Tensor | None, branch: Branch, *, reverse: bool
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """Of one branch: input u (B, S, E) and the tokens' own values (see `Inflow.pool`), raw step sizes (B, S, E)
        without bias, B and C (B, S, N)."""
        sources = None if context is None else conv_sources(flow.convolved, self.d_conv)[int(reverse)]
        u, own = flow.pool(branch.conv1d(flow.values, reverse=reverse, context=context, sources=sources))
        rank_values, b, c = branch.x_proj(u).split(self.splits, dim=-1)
        return u, own, branch.dt_proj(rank_values), b, c

    def scan_branch(
        self,
        flow: Inflow,
        direction: int,
        branch: Branch,
        projected: tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor],
        wanted: Wanted,
        *,
        reverse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Of what `project` gives the output y (B, L, E) and, if wanted, the step sizes (B, L, E) of live tokens."""
        u, own, raw_delta, b, c = projected
        bias = branch.dt_proj.bias
        y = flow.scan(
            direction,
            u,
            raw_delta,
            decay_rates(branch.A_log),
            b,
            c,
            branch.D,
            own=own,
            delta_bias=bias,
            gap=flow.scanned.gaps(reverse=reverse),
            size=flow.size,
            read=flow.read,
            reverse=reverse,
        )
        if wanted != "delta":
            return y, None
        delta = functional.softplus(raw_delta + bias)
        return y, delta if flow.read is None else gather_tokens(delta, flow.read)

    def null_delta(self) -> Tensor:
        """(directions, E): step size of a zero token among zero tokens, of which the convolution leaves its bias."""
        steps = []
        for branch in self.branches():
            rank_values = branch.x_proj(functional.silu(branch.conv1d.bias))[: self.splits[0]]
            steps.append(functional.softplus(branch.dt_proj(rank_values) + branch.dt_proj.bias))
        return torch.stack(steps)


class MambaMixer(BranchMixer):
    """The mixer of a block.

    kind   "v2": a branch of its own for each direction. "v1": both directions share the (forward) convolution, the
           projections and D, and have their own A. "none": forward only.
    halve  divide the sum of both directions by two before the output projection (v2 only)
    gamma  start of the layer scale, None for none
    """

    conv1d: CausalConv1d
    x_proj: nn.Linear
    dt_proj: StepProjection
    D: nn.Parameter
    conv1d_b: CausalConv1d  # these four with kind "v2" only
    x_proj_b: nn.Linear
    dt_proj_b: StepProjection
    D_b: nn.Parameter

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
        self.scale = 0.5 if halve and kind == "v2" else 1.0
        self.d_model = dim
        self.d_inner = d_inner
        self.directions = 1 if kind == "none" else 2
        self.d_state, self.d_conv = d_state, d_conv
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
        self.A_log = nn.Parameter(s4d_real(d_inner, d_state))
        if self.directions == 2:
            self.A_b_log = nn.Parameter(s4d_real(d_inner, d_state))
        self.out_proj = nn.Linear(d_inner, dim, bias=False)

    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        x, z = xz.chunk(2, dim=-1)  # (B, L, E) each
        statistics = self._scan(inflow(sequence, x, frozen, alignment), context, wanted)
        return gated_sum(statistics.y, z, self.scale), statistics

    def _scan(self, flow: Inflow, context: Tensor | None, wanted: Wanted) -> ScanStatistics:
        """The outputs of all directions and, if wanted, their step sizes."""
        outputs, deltas = [], []
        branches = self.branches()
        projected = self.project(flow, context, branches[0], reverse=False)
        for direction, branch in enumerate(branches):
            reverse = direction == 1
            if reverse and self.kind == "v2":
                projected = self.project(flow, context, branch, reverse=True)
            y, delta = self.scan_branch(flow, direction, branch, projected, wanted, reverse=reverse)
            outputs.append(y)
            if delta is not None:
                deltas.append(delta)
        return ScanStatistics(tuple(outputs), tuple(deltas))

    def branches(self) -> list[Branch]:
        first = Branch(self.conv1d, self.x_proj, self.dt_proj, self.A_log, self.D)
        if self.directions == 1:
            return [first]
        if self.kind == "v1":
            return [first, first._replace(A_log=self.A_b_log)]
        return [first, Branch(self.conv1d_b, self.x_proj_b, self.dt_proj_b, self.A_b_log, self.D_b)]


def init_output_projection(projection: nn.Linear, depth: int) -> None:
    """Kaiming uniform over the square root of the depth, as GPT-2 does: the residual stream adds up `depth` outputs."""
    nn.init.kaiming_uniform_(projection.weight, a=math.sqrt(5))
    if not projection.weight.is_meta:
        with torch.no_grad():
            projection.weight /= math.sqrt(depth)
