"""EfficientVMamba's mixer: VMamba's, but each of its four scans visits every second row and column of the grid only.

Written from TerryPei/EfficientVMamba 0bc5ee2 (classification/models/vmamba_efficient.py), with the authors' parameter
names. Letters: B batch, L tokens now, S steps of a scan, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.grids import Grid, gaps_by_size
from ssmprune_cli.interface import ScanStatistics, Wanted
from ssmprune_cli.models.common import Inflow, Visits, decay_rates, reorder
from ssmprune_cli.models.vmamba import VMambaMixer
from ssmprune_cli.tokens import Derivation, TokenSequence, gather_tokens

# First row and column of each scan, and whether it goes by columns.
STARTS = ((0, 0, False), (1, 0, True), (0, 1, False), (1, 1, True))


@dataclass(frozen=True)
class Share:
    """The tokens that one scan visits, in the order of its steps.

    How many of them are kept differs from image to image, and the number of steps must not: a scan takes as many as it
    can need, and after its own tokens it steps over some of another scan, which is not read.

    order  (S,) or (B, S) the row of the token that each step visits
    own    (B, S) whether it is one of this scan's; None: all are
    gap    (B, S) float32 tokens of this scan that are missing just before each step; None when none is
    """

    order: Tensor
    own: Tensor | None
    gap: Tensor | None


_SHARES = Derivation[tuple[Share, ...]]("shares of a grid")


def shares(sequence: TokenSequence, grid: Grid) -> tuple[Share, ...]:
    """The tokens of each scan."""

    def compute() -> tuple[Share, ...]:
        places = torch.arange(grid[0] * grid[1], device=sequence.positions.device).view(grid)
        routes = []
        for row, column, by_column in STARTS:
            route = places[row::2, column::2]
            routes.append((route.t() if by_column else route).flatten())
        return tuple(_share(route, sequence) for route in routes)

    return sequence.geometry.once(_SHARES, compute, grid)


def _share(route: Tensor, sequence: TokenSequence) -> Share:
    count = len(route)
    if sequence.is_dense:
        gap = None if sequence.merged is None else gaps_by_size(sequence.sizes()[:, route])
        return Share(route, None, gap)
    ranks = torch.full((sequence.length,), sequence.length, device=route.device)
    ranks = ranks.scatter(0, route, torch.arange(count, device=route.device))
    found, order = ranks[sequence.positions].sort(dim=1, stable=True)  # (B, L), other scans' tokens last
    steps = min(count, sequence.positions.shape[1])
    found, order = found[:, :steps], order[:, :steps]
    own = found < sequence.length
    # The first step skips nothing: the state is still zero there, so what was dropped before it cannot matter.
    gap = (found.diff(dim=1, prepend=found[:, :1] - 1) - 1) * own
    return Share(order, own, gap.float())


class AtrousMixer(VMambaMixer):
    """The mixer of a block. A token is visited by one scan, so the outputs of all scans are one (B, L, E)."""

    per_direction = ()

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, columns: Visits, wanted: Wanted) -> ScanStatistics:
        """Outputs of all directions at the tokens' own places, (B, L, E); if wanted, for each direction the step sizes
        that every token would have in it. u and `own` as `Inflow.pool` gives them."""
        rates = decay_rates(self.A_logs).unflatten(0, (self.directions, -1))  # (4, E, N)
        skips = self.Ds.unflatten(0, (self.directions, -1))  # (4, E)
        outputs, deltas = torch.zeros_like(u), []
        for direction, share in enumerate(shares(flow.scanned, flow.scanned.patch_grid)):
            if wanted == "delta":
                step = functional.softplus(self._projected(u, direction)[0] + self.dt_projs_bias[direction])
                deltas.append(step if flow.read is None else gather_tokens(step, flow.read))
            if not share.order.shape[-1]:  # merging left one row or column
                continue
            visited = reorder(u, share.order)  # (B, S, E)
            raw_delta, b, c = self._projected(visited, direction)
            y = flow.scan(
                direction,
                visited,
                raw_delta,
                rates[direction],
                b,
                c,
                skips[direction],
                own=None if own is None else reorder(own, share.order),
                delta_bias=self.dt_projs_bias[direction],
                gap=share.gap,
                size=None if flow.size is None else reorder(flow.size[..., None], share.order)[..., 0],
                read=None,
            )
            if share.own is not None:
                y = y * share.own[..., None]
            places = share.order.expand(len(u), -1)[..., None].expand_as(y)
            outputs = outputs.scatter_add(1, places, y)
        if flow.read is not None:
            outputs = gather_tokens(outputs, flow.read)
        return ScanStatistics((outputs,), tuple(deltas))

    def _projected(self, u: Tensor, direction: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of u (B, S, E) raw steps (B, S, E) without bias, B and C (B, S, N)."""
        rank, state = self.dt_projs_weight.shape[2], self.A_logs.shape[1]
        projected = functional.linear(u, self.x_proj_weight[direction])
        rank_values, b, c = projected.split([rank, state, state], dim=-1)
        return functional.linear(rank_values, self.dt_projs_weight[direction]), b, c
