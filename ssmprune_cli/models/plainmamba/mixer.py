"""PlainMamba's mixer: one convolution over the grid, and scans along four snakes that share everything but a part of B.

Written from ChenhongyiYang/PlainMamba 0975a1d, with its parameter names. Letters: B batch, L tokens now, M dropped
tokens still in sight, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import Mixer, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import gated_sum, grid_conv2d
from ssmprune_cli.models.common import (
    Inflow,
    channels_last_taps,
    decay_rates,
    inflow,
    reorder,
    some_outputs,
    steps_of,
)
from ssmprune_cli.models.mamba import s4d_real
from ssmprune_cli.models.plainmamba.routes import ROUTES, walks
from ssmprune_cli.tokens import TokenSequence, gather_tokens


class PlainMambaMixer(nn.Module, Mixer):
    """The mixer of a block: one convolution and one set of projections for four scans along snakes."""

    directions = ROUTES
    per_direction = ()

    def __init__(self, dim: int, *, d_inner: int, d_state: int, d_conv: int, dt_rank: int) -> None:
        super().__init__()
        self.d_model = dim
        self.d_inner = d_inner
        self.splits = [dt_rank, d_state, d_state]
        self.in_proj = nn.Linear(dim, 2 * self.d_inner)
        self.conv2d = nn.Conv2d(d_inner, d_inner, d_conv, padding=d_conv // 2, groups=d_inner)
        self.x_proj = nn.Linear(self.d_inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(s4d_real(self.d_inner, d_state))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.direction_Bs = nn.Parameter(nn.init.trunc_normal_(torch.empty(ROUTES + 1, d_state), std=0.02))
        self.out_proj = nn.Linear(self.d_inner, dim)

    def forward(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, ScanStatistics]:
        """`x` (B, L, d), the normalised tokens of `sequence`, to (B, L, d) and what the scans along its walks did.

        With `alignment`, each scan makes up for the tokens that `sequence` has lost. `frozen` (B, F, d) and `context`
        (B, M, d) are the normalised tokens of `sequence.frozen` and `sequence.context`: the first get no more than what
        the scans need of them, the second than what the convolution needs.
        """
        values, gate = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        flow = inflow(
            sequence, values, None if frozen is None else self._inner(frozen), alignment, sequence.patch_grid[1]
        )
        u, own = flow.pool(self._convolve(flow, context))
        statistics = self.scan(u, own, flow, wanted)
        mixed: Tensor = self.out_proj(gated_sum(statistics.y, gate))
        return mixed, statistics

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, wanted: Wanted) -> ScanStatistics:
        """Outputs and, if wanted, step sizes of all directions, (B, L, E) each, at the tokens' own places.

        u, own  as `Inflow.pool` gives them
        """
        rank_values, b, c = self.x_proj(u).split(self.splits, dim=-1)
        # The authors add the bias of dt_proj twice: in the projection, and once more in the scan.
        raw_delta, bias = self.dt_proj(rank_values), self.dt_proj.bias
        decay = decay_rates(self.A_log)
        outputs, deltas = [], []
        for direction, walk in enumerate(walks(flow.scanned, flow.scanned.patch_grid)):
            # Only u is brought into the order of the route, not dt, B and C: so the authors trained it. See Walk.rows.
            rows = (raw_delta, b, c)
            if walk.rows is not None:
                rows = (reorder(raw_delta, walk.rows), reorder(b, walk.rows), reorder(c, walk.rows))
            order, back = walk.visits.order, walk.visits.back
            y = flow.scan(
                direction,
                reorder(u, order),
                rows[0],
                decay,
                rows[1] + self.direction_Bs[walk.moves],  # moves are (L,) or (B, L)
                rows[2],
                self.D,
                own=None if own is None else reorder(own, order),
                delta_bias=bias,
                gap=walk.visits.gap,
                size=None if flow.size is None else reorder(flow.size[..., None], order)[..., 0],
                read=None if flow.read is None else steps_of(back, flow.read),
            )
            outputs.append(reorder(y, back) if flow.read is None else y)
            if wanted == "delta":
                delta = reorder(functional.softplus(rows[0] + bias), back)
                deltas.append(delta if flow.read is None else gather_tokens(delta, flow.read))
        return ScanStatistics(tuple(outputs), tuple(deltas))

    def _convolve(self, flow: Inflow, context: Tensor | None) -> Tensor:
        """(B, L, E) or (B, L + F, E): the values of `flow`, convolved; `context` (B, M, d) as in `forward`."""
        values, convolved = flow.values, flow.convolved
        places = None if convolved.is_dense else convolved.positions
        if convolved.context is not None and context is not None:
            values = torch.cat((values, self._inner(context)), dim=1)
            places = torch.cat((convolved.positions, convolved.context.positions), dim=1)
        outputs, taps = flow.values.shape[1], channels_last_taps(self.conv2d.weight)  # (E, K, K)
        return grid_conv2d(values, taps, self.conv2d.bias, convolved.patch_grid, places, outputs=outputs)

    def _inner(self, x: Tensor) -> Tensor:
        """The half of the input projection that feeds the scans: (B, M, d) to (B, M, E)."""
        return some_outputs(self.in_proj, x, slice(self.d_inner))

    def null_delta(self) -> Tensor:
        """(4, E): step size of an empty place among empty places of the grid; the convolution leaves its bias there."""
        u = functional.silu(self.conv2d.bias)  # type: ignore[arg-type]
        raw = self.dt_proj(self.x_proj(u)[: self.splits[0]])
        return functional.softplus(raw + self.dt_proj.bias).expand(ROUTES, -1)
