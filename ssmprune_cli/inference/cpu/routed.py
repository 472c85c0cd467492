"""PlainMamba and VMamba: the four scans of a block in one call of `routed_scans`.

Letters: B batch, L tokens now, E inner channels, G scan directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.inference.behaviour import first_unlike
from ssmprune_cli.inference.copying import as_kind
from ssmprune_cli.inference.explain import BY_OP, Journal
from ssmprune_cli.interface import ScanStatistics, Wanted
from ssmprune_cli.kernels import pack_routes, routed_scans
from ssmprune_cli.models import (
    AtrousMixer,
    AttentionMixer,
    CentredMixer,
    DirectionProjections,
    Inflow,
    LocalVMambaMixer,
    Mamba2Mixer,
    PlainMambaMixer,
    Visits,
    VMambaMixer,
    column_gaps,
    decay_rates,
    walks,
)
from ssmprune_cli.tokens import Derivation, TokenSequence

SCANS = "the scans of each block in one call"


def scans_refused(mixer: nn.Module) -> str | None:
    """Why `routed_scans` cannot stand for the scans of `mixer`; None if it can."""
    if isinstance(mixer, PlainMambaMixer):
        return first_unlike((mixer, PlainMambaMixer), (mixer.dt_proj, nn.Linear))
    if isinstance(mixer, AttentionMixer):
        return "it has attention and no scan"
    if isinstance(mixer, CentredMixer):
        return "its convolution looks ahead too"
    if isinstance(mixer, AtrousMixer):
        return "each of its scans visits a part of the grid"
    if isinstance(mixer, LocalVMambaMixer):
        return "each of its scans has a gate of its own"
    if isinstance(mixer, VMambaMixer):
        return first_unlike((mixer, VMambaMixer), (mixer.projections, DirectionProjections))
    if isinstance(mixer, Mamba2Mixer):
        return "its scan is that of Mamba-2, an op of its own"
    return f"a {type(mixer).__name__} is not known"


def _refused_now(flow: Inflow, wanted: Wanted) -> str | None:
    """Why one call cannot do the scans of this sequence; None if it can."""
    if wanted == "delta":
        return "the pruner looks at step sizes"
    if flow.read is not None or flow.cells is not None:
        return "frozen tokens feed the scans"
    if flow.alignment is not None and flow.alignment.mass is not None:
        return "steps grow with the size of tokens"
    return None


@dataclass(frozen=True)
class Routes:
    """The four routes side by side: (4, 1, L) where all samples are alike, else (4, B, L).

    order  the token that each step visits
    gap    (4, B, L) dropped tokens before each step; None when no token is missing
    moves  PlainMamba's move of each step
    rows   the token that lends each step its dt, B and C; None for the one at the step's own place
    """

    order: Tensor
    gap: Tensor | None
    moves: Tensor | None = None
    rows: Tensor | None = None


_SNAKES = Derivation[Routes]("snakes side by side")
_CROSS = Derivation[Routes]("rows and columns side by side")


class FusedPlainMambaMixer(PlainMambaMixer):
    """A mixer whose scans are one call, where nothing looks at each of them."""

    packed: Tensor
    block: int
    journal: Journal

    @classmethod
    def of(cls, mixer: PlainMambaMixer, block: int, journal: Journal) -> FusedPlainMambaMixer:
        made = as_kind(mixer, cls, block=block, journal=journal)
        projection = mixer.dt_proj
        # All routes are alike. The authors add the bias of dt_proj twice, see PlainMambaMixer.scan.
        route = pack_routes(
            projection.weight[None], decay_rates(mixer.A_log)[None], 2 * projection.bias[None], mixer.D[None]
        )
        made.register_buffer("packed", route.repeat(mixer.directions, 1), persistent=False)
        return made

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, wanted: Wanted) -> ScanStatistics:
        reason = _refused_now(flow, wanted)
        if reason is not None:
            self.journal.write(self.block, self.block, BY_OP, reason)
            return super().scan(u, own, flow, wanted)
        self.journal.write(self.block, self.block, SCANS)
        routes, alignment = _snakes(flow.scanned), flow.alignment
        summed = routed_scans(
            u,
            self.x_proj(u)[:, :, None],
            self.packed,
            self.splits[1],
            routes.order,
            rows=routes.rows,
            extra_B=self.direction_Bs[routes.moves],
            gap=None if alignment is None else routes.gap,
            gap_delta=None if alignment is None or routes.gap is None else alignment.gap_delta,
        )
        return ScanStatistics((summed,))


def _snakes(sequence: TokenSequence) -> Routes:
    def compute() -> Routes:
        each = walks(sequence, sequence.patch_grid)
        order, moves = torch.stack([walk.visits.order for walk in each]), torch.stack([walk.moves for walk in each])
        if order.ndim == 2:
            order, moves = order[:, None], moves[:, None]
        rows = [walk.rows for walk in each if walk.rows is not None]
        gaps = [walk.visits.gap for walk in each if walk.visits.gap is not None]
        return Routes(order, torch.stack(gaps) if gaps else None, moves, torch.stack(rows) if rows else None)

    return sequence.geometry.once(_SNAKES, compute)


class FusedVMambaMixer(VMambaMixer):
    """A mixer whose scans are one call, where nothing looks at each of them."""

    packed: Tensor
    block: int
    journal: Journal

    @classmethod
    def of(cls, mixer: VMambaMixer, block: int, journal: Journal) -> FusedVMambaMixer:
        made = as_kind(mixer, cls, block=block, journal=journal)
        by_direction = (mixer.directions, -1)
        rates, skips = (each.unflatten(0, by_direction) for each in (decay_rates(mixer.A_logs), mixer.Ds))
        packed = pack_routes(mixer.dt_projs_weight, rates, mixer.dt_projs_bias, skips)
        made.register_buffer("packed", packed, persistent=False)
        return made

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, columns: Visits, wanted: Wanted) -> ScanStatistics:
        reason = _refused_now(flow, wanted)
        if reason is not None:
            self.journal.write(self.block, self.block, BY_OP, reason)
            return super().scan(u, own, flow, columns, wanted)
        self.journal.write(self.block, self.block, SCANS)
        routes, alignment = _rows_and_columns(flow.scanned, columns), flow.alignment
        projected = functional.linear(u, self.x_proj_weight.flatten(0, 1))  # (B, L, 4 (R + 2N))
        summed = routed_scans(
            u,
            projected.unflatten(2, (self.directions, -1)),
            self.packed,
            self.A_logs.shape[1],
            routes.order,
            rows=routes.order,
            gap=None if alignment is None else routes.gap,
            gap_delta=None if alignment is None or routes.gap is None else alignment.gap_delta,
        )
        return ScanStatistics((summed,))


def _rows_and_columns(sequence: TokenSequence, columns: Visits) -> Routes:
    def compute() -> Routes:
        rows = torch.arange(columns.order.shape[-1], device=columns.order.device).expand(columns.order.shape)
        order = torch.stack([rows, columns.order, rows.flip(-1), columns.order.flip(-1)])  # (4, L) or (4, B, L)
        order = order[:, None] if order.ndim == 2 else order
        gap, down, up = None, column_gaps(columns, reverse=False), column_gaps(columns, reverse=True)
        if down is not None and up is not None:
            across, back = sequence.gaps(reverse=False), sequence.gaps(reverse=True)
            gap = torch.stack([across, down, back.flip(1), up.flip(1)])
        return Routes(order, gap)

    return sequence.geometry.once(_CROSS, compute)
