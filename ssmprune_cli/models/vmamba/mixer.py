"""The 2-D selective scan ("SS2D") of VMamba: four scans over a grid of tokens.

Written from MzeroMiko/VMamba 2ed52ea (classification/models/vmamba.py, forward types `v05_noz` and `v0`), with the
authors' parameter names. Letters: B batch, L tokens now, d model width, E inner channels, N state, R rank of the step
projection. Parameters of the four directions are stacked: (4, ...), or (4 E, ...) for A and D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import Mixer, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import grid_conv2d
from ssmprune_cli.models.common import (
    Inflow,
    Visits,
    channels_last_taps,
    decay_rates,
    inflow,
    reorder,
    some_outputs,
    steps_of,
    visits,
)
from ssmprune_cli.models.mamba import StepProjection, s4d_real
from ssmprune_cli.tokens import Derivation, TokenSequence, gather_tokens

DIRECTIONS = 4  # rows, columns, rows from the end, columns from the end


class DirectionProjections(nn.Module):
    """Step sizes, B and C of all directions. Has no weights: the authors keep them in the mixer."""

    def forward(
        self, u: Tensor, columns: Visits, x_proj_weight: Tensor, dt_projs_weight: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each direction raw steps (B, L, E) without bias, B and C (B, L, N), as the scan visits the tokens.

        u                (B, L, E), in the order of the sequence
        columns          how the column scans visit the tokens
        x_proj_weight    (4, R + 2N, E)
        dt_projs_weight  (4, E, R)
        """
        rank = dt_projs_weight.shape[2]
        state = (x_proj_weight.shape[1] - rank) // 2
        # A projection sees one token at a time, so all directions can share one product before they part ways.
        projected = functional.linear(u, x_proj_weight.flatten(0, 1)).chunk(DIRECTIONS, dim=-1)  # (B, L, R + 2N) each
        found = []
        for direction, values in enumerate(projected):
            visited = reorder(values, columns.order) if direction % 2 else values
            rank_values, b, c = visited.split([rank, state, state], dim=-1)
            found.append((functional.linear(rank_values, dt_projs_weight[direction]), b, c))
        return found


class VMambaMixer(nn.Module, Mixer):
    """The mixer of a block.

    gated      half of the input projection becomes a gate: silu(z) (v0 only)
    conv_bias  the convolution has a bias (v0 only)
    """

    directions = DIRECTIONS
    per_direction: tuple[str, ...] = ("projections",)

    def __init__(self, dim: int, *, d_inner: int, d_state: int, dt_rank: int, gated: bool, conv_bias: bool) -> None:
        super().__init__()
        self.d_model = dim
        self.d_inner = d_inner
        self.gated = gated
        self.in_proj = nn.Linear(dim, 2 * d_inner if gated else d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner, bias=conv_bias)
        self.projections: nn.Module = DirectionProjections()
        bound = d_inner**-0.5  # nn.Linear's own initialisation, which the authors leave as it is
        self.x_proj_weight = nn.Parameter(
            torch.empty(DIRECTIONS, dt_rank + 2 * d_state, d_inner).uniform_(-bound, bound)
        )
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, d_inner, dt_rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, d_inner))
        for weight, bias in zip(self.dt_projs_weight.data, self.dt_projs_bias.data, strict=True):
            start = StepProjection(dt_rank, d_inner)
            weight.copy_(start.weight.data)
            bias.copy_(start.bias.data)
        self.A_logs = nn.Parameter(s4d_real(DIRECTIONS * d_inner, d_state))
        self.Ds = nn.Parameter(torch.ones(DIRECTIONS * d_inner))
        self.out_norm = nn.LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, dim, bias=False)
        for projection in (self.in_proj, self.out_proj):
            nn.init.trunc_normal_(projection.weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        grid: tuple[int, int],
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence` on `grid`, to (B, L, d) and what the scans did.

        With `alignment`, each scan makes up for the tokens that `sequence` has lost on its own way. `frozen` (B, F, d)
        and `context` (B, M, d) are the normalised tokens of `sequence.frozen` and `sequence.context`: the first get no
        more than what the scans need of them, the second than what the convolution needs.
        """
        u = self.in_proj(x)  # (B, L, E), or (B, L, 2E) with a gate
        gate = None
        if self.gated:
            u, gate = u.chunk(2, dim=-1)  # (B, L, E) each
        if context is not None:
            context = self._inner(context)
        flow = inflow(sequence, u, None if frozen is None else self._inner(frozen), alignment, grid[1])
        u, own = flow.pool(self._convolve(flow.values, context, flow.convolved, grid))
        statistics = self.scan(u, own, flow, column_visits(flow.scanned, grid), wanted)
        mixed: Tensor = self.out_norm(self.merge(statistics.y, sequence))
        if gate is not None:
            mixed = mixed * functional.silu(gate)
        projected: Tensor = self.out_proj(mixed)
        return projected, statistics

    def merge(self, ys: Sequence[Tensor], sequence: TokenSequence) -> Tensor:
        """The sum of all directions' outputs (B, L, E); of one, which is that sum, itself."""
        if len(ys) == 1:
            return ys[0]
        # (rows + rows from the end) + (columns + columns from the end), the authors' order of addition.
        return (ys[0] + ys[2]) + (ys[1] + ys[3])

    def _inner(self, x: Tensor) -> Tensor:
        """The part of the input projection that feeds the scans: (B, M, d) to (B, M, E)."""
        return some_outputs(self.in_proj, x, slice(self.d_inner))

    def _convolve(self, x: Tensor, context: Tensor | None, sequence: TokenSequence, grid: tuple[int, int]) -> Tensor:
        """(B, L, E): the input of the scans, from projected tokens x (B, L, E) and those of the context (B, M, E)."""
        positions = None if sequence.is_dense else sequence.positions
        if context is not None and sequence.context is not None:
            x, positions = (
                torch.cat((x, context), dim=1),
                torch.cat((sequence.positions, sequence.context.positions), 1),
            )
        kept = sequence.positions.shape[1]
        return grid_conv2d(x, channels_last_taps(self.conv2d.weight), self.conv2d.bias, grid, positions, outputs=kept)

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, columns: Visits, wanted: Wanted) -> ScanStatistics:
        """Outputs and, if wanted, step sizes of all directions, (B, L, E) each, at the tokens' own places.

        u, own  as `Inflow.pool` gives them
        """
        a = decay_rates(self.A_logs).unflatten(0, (DIRECTIONS, -1))  # (4, E, N)
        d = self.Ds.unflatten(0, (DIRECTIONS, -1))  # (4, E)
        inputs = (u, reorder(u, columns.order))
        owns = (None, None) if own is None else (own, reorder(own, columns.order))
        sizes = (None, None) if flow.size is None else (flow.size, reorder(flow.size[..., None], columns.order)[..., 0])
        reads = (None, None) if flow.read is None else (flow.read, steps_of(columns.back, flow.read))
        projected = self.projections(u, columns, self.x_proj_weight, self.dt_projs_weight)
        outputs, deltas = [], []
        for direction, (raw_delta, b, c) in enumerate(projected):
            by_column, reverse = direction % 2 == 1, direction >= 2
            y = flow.scan(
                direction,
                inputs[by_column],
                raw_delta,
                a[direction],
                b,
                c,
                d[direction],
                own=owns[by_column],
                delta_bias=self.dt_projs_bias[direction],
                gap=column_gaps(columns, reverse=reverse) if by_column else flow.scanned.gaps(reverse=reverse),
                size=sizes[by_column],
                read=reads[by_column],
                reverse=reverse,
            )
            outputs.append(reorder(y, columns.back) if by_column and flow.read is None else y)
            if wanted == "delta":
                delta = functional.softplus(raw_delta + self.dt_projs_bias[direction])
                delta = reorder(delta, columns.back) if by_column else delta
                deltas.append(delta if flow.read is None else gather_tokens(delta, flow.read))
        return ScanStatistics(tuple(outputs), tuple(deltas))

    def null_delta(self) -> Tensor:
        """(4, E): step size of a zero token among zero tokens, of which the convolution leaves its bias."""
        bias = self.conv2d.bias
        if bias is None:
            return functional.softplus(self.dt_projs_bias)
        rank = self.dt_projs_weight.shape[2]
        rank_values = self.x_proj_weight[:, :rank] @ functional.silu(bias)  # (4, R)
        raw = (self.dt_projs_weight @ rank_values[..., None]).squeeze(-1)  # (4, E)
        return functional.softplus(raw + self.dt_projs_bias)


_COLUMNS = Derivation[Visits]("columns")


def column_visits(sequence: TokenSequence, grid: tuple[int, int]) -> Visits:
    """How a scan visits the tokens of `sequence` by the columns of `grid`, left to right and each downwards."""

    def compute() -> Visits:
        raster = torch.arange(math.prod(grid), device=sequence.positions.device).view(grid)
        return visits(raster.t().flatten(), sequence)

    return sequence.geometry.once(_COLUMNS, compute, grid)


def column_gaps(route: Visits, *, reverse: bool) -> Tensor | None:
    """How many tokens a scan skips at each step of `route`, or at each step of a scan from its end."""
    if route.gap is None or not reverse:
        return route.gap
    return functional.pad(route.gap[:, 1:], (0, 1))
