"""The 2-D selective scan ("SS2D") of VMamba: four scans over a grid of tokens.

Written from MzeroMiko/VMamba 2ed52ea (classification/models/vmamba.py, forward types `v05_noz` and `v0`), with the
authors' parameter names. Letters: B batch, L tokens now, d model width, E inner channels, N state, R rank of the step
projection. Parameters of the four directions are stacked: (4, ...), or (4 E, ...) for A and D.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import fuses_inner, grid_conv2d, pack_routes, routed_scans
from ssmprune_cli.models.common import (
    Derived,
    Inflow,
    Kept,
    Visits,
    channels_last_taps,
    decay_rates,
    inflow,
    is_plain,
    packed_linear,
    project,
    reorder,
    steps_of,
    visits,
)
from ssmprune_cli.models.mamba import StepProjection, s4d_real
from ssmprune_cli.tokens import TokenSequence, gather_tokens

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


class VMambaMixer(nn.Module):
    """Implements `tokens.Mixer`.

    gated      half of the input projection becomes a gate: silu(z) (v0 only)
    conv_bias  the convolution has a bias (v0 only)
    """

    directions = DIRECTIONS
    per_direction = ("projections",)

    def __init__(self, dim: int, *, d_inner: int, d_state: int, dt_rank: int, gated: bool, conv_bias: bool) -> None:
        super().__init__()
        self.d_inner = d_inner
        self.gated = gated
        self.in_proj = nn.Linear(dim, 2 * d_inner if gated else d_inner, bias=False)
        self.conv2d = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner, bias=conv_bias)
        self.projections = DirectionProjections()
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
        self._rates, self._taps, self._packed = Derived(decay_rates), Derived(channels_last_taps), Derived(_packed)
        self._packed_in, self._packed_out = Kept(packed_linear), Kept(packed_linear)
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
        u = project(self.in_proj, x, self._packed_in)  # (B, L, E), or (B, L, 2E) with a gate
        gate = None
        if self.gated:
            u, gate = u.chunk(2, dim=-1)  # (B, L, E) each
        if context is not None:
            context = self._inner(context)
        flow = inflow(sequence, u, None if frozen is None else self._inner(frozen), alignment, grid[1])
        u, own = flow.pool(self._convolve(flow.values, context, flow.convolved, grid))
        columns = column_visits(flow.scanned, grid)
        deltas: list[Tensor] = []
        if wanted != "delta" and flow.plain and self._fuses(u):
            summed = self._scan_at_once(u, flow, columns)
            outputs = [summed]
        else:
            outputs, deltas = self._scan(u, own, flow, columns, wanted)
            # (rows + rows from the end) + (columns + columns from the end), the authors' order of addition.
            summed = (outputs[0] + outputs[2]) + (outputs[1] + outputs[3])
        mixed: Tensor = self.out_norm(summed)
        if gate is not None:
            mixed = mixed * functional.silu(gate)
        projected = project(self.out_proj, mixed, self._packed_out)
        return projected, ScanStatistics(tuple(outputs), tuple(deltas))

    def _inner(self, x: Tensor) -> Tensor:
        """The part of the input projection that feeds the scans: (B, M, d) to (B, M, E)."""
        return functional.linear(x, self.in_proj.weight[: self.d_inner])

    def _convolve(self, x: Tensor, context: Tensor | None, sequence: TokenSequence, grid: tuple[int, int]) -> Tensor:
        """(B, L, E): the input of the scans, from projected tokens x (B, L, E) and those of the context (B, M, E)."""
        positions = None if sequence.is_dense else sequence.positions
        if context is not None and sequence.context is not None:
            x, positions = (
                torch.cat((x, context), dim=1),
                torch.cat((sequence.positions, sequence.context.positions), 1),
            )
        kept = sequence.positions.shape[1]
        return grid_conv2d(x, self._taps(self.conv2d.weight), self.conv2d.bias, grid, positions, outputs=kept)

    def _fuses(self, u: Tensor) -> bool:
        return is_plain(self.projections, DirectionProjections) and fuses_inner(u, self.A_logs.shape[1])

    def _scan_at_once(self, u: Tensor, flow: Inflow, columns: Visits) -> Tensor:
        """The sum of the outputs of all directions (B, L, E), by one op for inference."""
        (order, gap), alignment = _routes(flow.scanned, columns), flow.alignment
        projected = functional.linear(u, self.x_proj_weight.flatten(0, 1)).unflatten(2, (DIRECTIONS, -1))
        return routed_scans(
            u,
            projected,
            self._packed(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds),
            self.A_logs.shape[1],
            order,
            rows=order,
            gap=None if alignment is None else gap,
            gap_delta=None if alignment is None or gap is None else alignment.gap_delta,
        )

    def _scan(
        self, u: Tensor, own: Tensor | None, flow: Inflow, columns: Visits, wanted: Wanted
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and, if wanted, step sizes of all directions, (B, L, E) each, at the tokens' own places.

        u, own  as `Inflow.pool` gives them
        """
        a = self._rates(self.A_logs).unflatten(0, (DIRECTIONS, -1))  # (4, E, N)
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
                gap=_gaps(columns, reverse=reverse) if by_column else flow.scanned.gaps(reverse=reverse),
                size=sizes[by_column],
                read=reads[by_column],
                reverse=reverse,
            )
            outputs.append(reorder(y, columns.back) if by_column and flow.read is None else y)
            if wanted == "delta":
                delta = functional.softplus(raw_delta + self.dt_projs_bias[direction])
                delta = reorder(delta, columns.back) if by_column else delta
                deltas.append(delta if flow.read is None else gather_tokens(delta, flow.read))
        return outputs, deltas

    def null_delta(self) -> Tensor:
        """(4, E): step size of a zero token among zero tokens, of which the convolution leaves its bias."""
        bias = self.conv2d.bias
        if bias is None:
            return functional.softplus(self.dt_projs_bias)
        rank = self.dt_projs_weight.shape[2]
        rank_values = self.x_proj_weight[:, :rank] @ functional.silu(bias)  # (4, R)
        raw = (self.dt_projs_weight @ rank_values[..., None]).squeeze(-1)  # (4, E)
        return functional.softplus(raw + self.dt_projs_bias)


def column_visits(sequence: TokenSequence, grid: tuple[int, int]) -> Visits:
    """How a scan visits the tokens of `sequence` by the columns of `grid`, left to right and each downwards."""
    if "columns" not in sequence.memo:
        raster = torch.arange(math.prod(grid), device=sequence.positions.device).view(grid)
        sequence.memo["columns"] = visits(raster.t().flatten(), sequence)
    found: Visits = sequence.memo["columns"]
    return found


def _gaps(route: Visits, *, reverse: bool) -> Tensor | None:
    """How many tokens a scan skips at each step of `route`, or at each step of a scan from its end."""
    if route.gap is None or not reverse:
        return route.gap
    return functional.pad(route.gap[:, 1:], (0, 1))


def _routes(sequence: TokenSequence, columns: Visits) -> tuple[Tensor, Tensor | None]:
    """Of all directions the token that each step visits, (4, 1, L) or (4, B, L), and the gap before each step
    (4, B, L), None when no token is missing."""
    if "routes" not in sequence.memo:
        rows = torch.arange(columns.order.shape[-1], device=columns.order.device).expand(columns.order.shape)
        order = torch.stack([rows, columns.order, rows.flip(-1), columns.order.flip(-1)])  # (4, L) or (4, B, L)
        order = order[:, None] if order.ndim == 2 else order
        gap, down, up = None, _gaps(columns, reverse=False), _gaps(columns, reverse=True)
        if down is not None and up is not None:
            across, back = sequence.gaps(reverse=False), sequence.gaps(reverse=True)
            gap = torch.stack([across, down, back.flip(1), up.flip(1)])
        sequence.memo["routes"] = order, gap
    routes: tuple[Tensor, Tensor | None] = sequence.memo["routes"]
    return routes


def _packed(dt_weights: Tensor, dt_biases: Tensor, A_logs: Tensor, Ds: Tensor) -> Tensor:
    """For `routed_scans`."""
    rates, skips = (each.unflatten(0, (DIRECTIONS, -1)) for each in (decay_rates(A_logs), Ds))
    return pack_routes(dt_weights, rates, dt_biases, skips)
