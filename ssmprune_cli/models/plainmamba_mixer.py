"""PlainMamba's mixer: one convolution over the grid, and scans along four snakes that share everything but a part of B.

Written from ChenhongyiYang/PlainMamba 0975a1d, with its parameter names. Letters: B batch, L tokens now, M dropped
tokens still in sight, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.kernels import gated_sum, grid_conv2d, selective_scan
from ssmprune_cli.models.plainmamba_routes import ROUTES, Walk
from ssmprune_cli.models.routes import reorder
from ssmprune_cli.tokens import ScanAlignment, ScanStatistics, TokenSequence


class PlainMambaMixer(nn.Module):
    """Implements `tokens.Mixer`: one convolution and one set of projections for four scans along snakes."""

    directions = ROUTES
    per_direction = ()

    def __init__(
        self, dim: int, *, grid: tuple[int, int], d_inner: int, d_state: int, d_conv: int, dt_rank: int
    ) -> None:
        super().__init__()
        self.d_inner = d_inner
        self.grid = grid
        self.splits = [dt_rank, d_state, d_state]
        self.in_proj = nn.Linear(dim, 2 * self.d_inner)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner)
        self.x_proj = nn.Linear(self.d_inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.d_inner, 1))  # A = -1, -2, ...
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(ROUTES + 1, d_state), std=0.02))
        self.out_proj = nn.Linear(self.d_inner, dim)

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        routes: tuple[Walk, ...],
        alignment: ScanAlignment | None,
        want_delta: bool,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence`, to (B, L, d) and what the scans along `routes` did.

        With `alignment`, each scan decays over the tokens that `sequence` has lost. `context` (B, M, d) are the
        normalised tokens of `sequence.context`: they get no more than what the convolution needs of them.
        """
        values, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        places = None if sequence.is_dense else sequence.positions
        if sequence.context is not None and context is not None:
            inner = slice(self.d_inner)
            others = functional.linear(context, self.in_proj.weight[inner], self.in_proj.bias[inner])  # (B, M, E)
            values = torch.cat((values, others), dim=1)
            places = torch.cat((sequence.positions, sequence.context.positions), dim=1)
        length = x.shape[1]
        u = grid_conv2d(values, self.conv2d.weight[:, 0], self.conv2d.bias, self.grid, places, outputs=length)
        rank_values, b, c = self.x_proj(u).split(self.splits, dim=-1)
        # The authors add the bias of dt_proj twice: in the projection, and once more in the scan.
        raw_delta, bias = self.dt_proj(rank_values), self.dt_proj.bias
        decay = -torch.exp(self.A_log)
        outputs, deltas = [], []
        for direction, walk in enumerate(routes):
            # Only u is brought into the order of the route, not dt, B and C: so the authors trained it. See Walk.rows.
            rows = (raw_delta, b, c)
            if walk.rows is not None:
                rows = (reorder(raw_delta, walk.rows), reorder(b, walk.rows), reorder(c, walk.rows))
            y = selective_scan(
                reorder(u, walk.visits.order),
                rows[0],
                decay,
                rows[1] + self.direction_Bs[walk.moves],  # (L, N) or (B, L, N)
                rows[2],
                self.D,
                delta_bias=bias,
                gap=None if alignment is None else walk.visits.gap,
                gap_delta=None if alignment is None else alignment.gap_delta[direction],
            )
            outputs.append(reorder(y, walk.visits.back))
            if want_delta:
                deltas.append(reorder(functional.softplus(rows[0] + bias), walk.visits.back))
        projected: Tensor = self.out_proj(gated_sum(outputs, gate))
        return projected, ScanStatistics(tuple(outputs), tuple(deltas))

    def null_delta(self) -> Tensor:
        """(4, E): step size of an empty place among empty places of the grid; the convolution leaves its bias there."""
        u = functional.silu(self.conv2d.bias)  # type: ignore[arg-type]
        raw = self.dt_proj(self.x_proj(u)[: self.splits[0]])
        return functional.softplus(raw + self.dt_proj.bias).expand(ROUTES, -1)
