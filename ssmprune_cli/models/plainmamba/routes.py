"""PlainMamba's four scan routes: snakes over the grid, dense or with tokens missing.

Written from ChenhongyiYang/PlainMamba 0975a1d (mmcls/plain_mamba_dev/models/plain_mamba/plain_mamba_layer.py).
Letters: B batch, L tokens now, G tokens of the dense grid. A *step* is one tick of a scan, a *rank* the step at which
the dense scan visits a token, a *move* the direction in which the snake reaches a place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.models.common import Visits, visits
from ssmprune_cli.tokens import Derivation, TokenSequence, nearest

ROUTES = 4
START, RIGHT, LEFT, UP, DOWN = range(5)  # rows of the weight `direction_Bs`


@dataclass(frozen=True)
class Walk:
    """One snake through the tokens of a sequence.

    visits  which token each step visits, and what it skips
    moves   (L,) or (B, L) move of each step. A kept token has the move that reaches it in the dense route: the snake
            still runs over the places of the dropped tokens, it only finds nothing there.
    rows    (B, L) index of the token in the sequence that lends each step its dt, B and C; None: step t takes row t

    PlainMamba lets a route permute u only. Step r of every route takes dt, B and C of the token at raster position r,
    whichever token it visits. A token of rank r that is kept goes on taking them from raster position r, because a rank
    never changes, so where both tokens are kept the step is that of the dense model. If the token at r was dropped, the
    kept token nearest to r in raster order stands in for it (the earlier one of two). The steps of dropped tokens make
    up the gaps, each with the delta of its own rank.
    """

    visits: Visits
    moves: Tensor
    rows: Tensor | None


_WALKS = Derivation[tuple[Walk, ...]]("walks")


def walks(sequence: TokenSequence, grid: tuple[int, int]) -> tuple[Walk, ...]:
    """The four walks through `sequence`, whose positions are raster indices into `grid` (rows, columns)."""

    def compute() -> tuple[Walk, ...]:
        routes = snakes(grid, sequence.positions.device)
        return tuple(_walk(sequence, route, grid) for route in routes)

    return sequence.geometry.once(_WALKS, compute, grid)


def snakes(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, ...]:
    """The four routes, (G,) positions each: by rows from the top, the same backwards, by columns from the left, the
    same backwards. Every second row, or column, is passed in the other direction."""
    # Computed anew for every batch: as buffers they would be lost when a model built without memory gets its weights.
    places = torch.arange(grid[0] * grid[1], device=device).view(grid)
    by_rows, by_columns = _boustrophedon(places), _boustrophedon(places.t())
    return by_rows, by_rows.flip(0), by_columns, by_columns.flip(0)


def moves(route: Tensor, grid: tuple[int, int]) -> Tensor:
    """(G,) the move by which `route` (G,) reaches each of its places."""
    row, column = route.div(grid[1], rounding_mode="floor"), route.remainder(grid[1])
    down, right = row[1:] - row[:-1], column[1:] - column[:-1]  # (G - 1,)
    sideways = torch.where(right > 0, RIGHT, LEFT)
    found = torch.where(down > 0, DOWN, torch.where(down < 0, UP, sideways))
    return torch.cat((torch.full_like(route[:1], START), found))


def _boustrophedon(places: Tensor) -> Tensor:
    odd = torch.arange(places.shape[0], device=places.device)[:, None].remainder(2) == 1
    return torch.where(odd, places.flip(1), places).flatten()


def _walk(sequence: TokenSequence, route: Tensor, grid: tuple[int, int]) -> Walk:
    taken, made = visits(route, sequence), moves(route, grid)
    if sequence.is_dense:
        return Walk(taken, made, None)
    return Walk(taken, made[taken.ranks], nearest(sequence.positions, taken.ranks))
