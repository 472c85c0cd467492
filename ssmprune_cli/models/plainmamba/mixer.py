"""PlainMamba's mixer: one convolution over the grid, and scans along four snakes that share everything but a part of B.

Written from ChenhongyiYang/PlainMamba 0975a1d, with its parameter names. Letters: B batch, L tokens now, M dropped
tokens still in sight, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import fuses_inner, gated_sum, grid_conv2d, pack_routes, routed_scans
from ssmprune_cli.models.common import (
    Derived,
    Inflow,
    Kept,
    channels_last_taps,
    decay_rates,
    inflow,
    is_plain,
    packed_linear,
    project,
    reorder,
    steps_of,
)
from ssmprune_cli.models.mamba import s4d_real
from ssmprune_cli.models.plainmamba.routes import ROUTES, all_walks, walks
from ssmprune_cli.tokens import TokenSequence, gather_tokens


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
        self.A_log = nn.Parameter(s4d_real(self.d_inner, d_state))
        self._rates, self._taps, self._packed = Derived(decay_rates), Derived(channels_last_taps), Derived(_packed)
        self._packed_in, self._packed_out = Kept(packed_linear), Kept(packed_linear)
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
        values, gate = project(self.in_proj, x, self._packed_in).chunk(2, dim=-1)  # (B, L, E) each
        flow = inflow(sequence, values, None if frozen is None else self._inner(frozen), alignment, self.grid[1])
        u, own = flow.pool(self._convolve(flow, context))
        projected = self.x_proj(u)
        deltas: list[Tensor] = []
        if wanted != "delta" and flow.plain and is_plain(self.dt_proj, nn.Linear) and fuses_inner(u, self.splits[1]):
            outputs = [self._scan_at_once(u, projected, flow)]
        else:
            outputs, deltas = self._scan(u, own, projected, flow, wanted)
        mixed = project(self.out_proj, gated_sum(outputs, gate), self._packed_out)
        return mixed, ScanStatistics(tuple(outputs), tuple(deltas))

    def _scan_at_once(self, u: Tensor, projected: Tensor, flow: Inflow) -> Tensor:
        """The sum of the outputs of all directions (B, L, E), by one op for inference."""
        routes, alignment = all_walks(flow.scanned, self.grid), flow.alignment
        return routed_scans(
            u,
            projected[:, :, None],
            self._packed(self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D),
            self.splits[1],
            routes.order,
            rows=routes.rows,
            extra_B=self.direction_Bs[routes.moves],
            gap=None if alignment is None else routes.gap,
            gap_delta=None if alignment is None or routes.gap is None else alignment.gap_delta,
        )

    def _scan(
        self, u: Tensor, own: Tensor | None, projected: Tensor, flow: Inflow, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and, if wanted, step sizes of all directions, (B, L, E) each, at the tokens' own places.

        u, own     as `Inflow.pool` gives them
        projected  (B, L, R + 2N)
        """
        rank_values, b, c = projected.split(self.splits, dim=-1)
        # The authors add the bias of dt_proj twice: in the projection, and once more in the scan.
        raw_delta, bias = self.dt_proj(rank_values), self.dt_proj.bias
        decay = self._rates(self.A_log)
        outputs, deltas = [], []
        for direction, walk in enumerate(walks(flow.scanned, self.grid)):
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
        return outputs, deltas

    def _convolve(self, flow: Inflow, context: Tensor | None) -> Tensor:
        """(B, L, E) or (B, L + F, E): the values of `flow`, convolved; `context` (B, M, d) as in `forward`."""
        values, convolved = flow.values, flow.convolved
        places = None if convolved.is_dense else convolved.positions
        if convolved.context is not None and context is not None:
            values = torch.cat((values, self._inner(context)), dim=1)
            places = torch.cat((convolved.positions, convolved.context.positions), dim=1)
        outputs = flow.values.shape[1]
        return grid_conv2d(values, self._taps(self.conv2d.weight), self.conv2d.bias, self.grid, places, outputs=outputs)

    def _inner(self, x: Tensor) -> Tensor:
        """The half of the input projection that feeds the scans: (B, M, d) to (B, M, E)."""
        return functional.linear(x, self.in_proj.weight[: self.d_inner], self.in_proj.bias[: self.d_inner])

    def null_delta(self) -> Tensor:
        """(4, E): step size of an empty place among empty places of the grid; the convolution leaves its bias there."""
        u = functional.silu(self.conv2d.bias)  # type: ignore[arg-type]
        raw = self.dt_proj(self.x_proj(u)[: self.splits[0]])
        return functional.softplus(raw + self.dt_proj.bias).expand(ROUTES, -1)


def _packed(dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """For `routed_scans`: all routes are alike. The authors add the bias of dt_proj twice, see `_scan`."""
    each = pack_routes(dt_weight[None], decay_rates(A_log)[None], 2 * dt_bias[None], D[None])
    return each.repeat(ROUTES, 1)
