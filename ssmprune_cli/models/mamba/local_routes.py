"""LocalVim's scan routes: rows, columns and windows of the grid, forwards or backwards, dense or with tokens missing.

Written from hunto/LocalMamba 75e5d1f (classification/lib/models/mamba/local_scan.py, multi_mamba.py). Letters: B batch,
L tokens now, S steps of a scan. A *step* is one tick of a scan, a *rank* the step at which the dense scan visits a
token.

A window of w x w places is passed row by row, and the windows are too. Where windows do not fill the grid, the authors
pad it with tokens of zeros to the right and below: the scan steps over these as over others. The class token has no
place in the grid: every route visits it at the step that is its own position.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.grids import Grid, patch_positions
from ssmprune_cli.models.common import inverse, reorder, visits
from ssmprune_cli.tokens import Derivation, Dropped, Geometry, TokenSequence

DIRECTION = re.compile(r"(?P<route>h|v|w(?P<window>[1-9]\d{0,3}))(?P<flip>_flip)?")  # as the authors name them


@dataclass(frozen=True)
class Path:
    """How one direction goes through the tokens of a sequence.

    sequence  the tokens as its steps, with their ranks for positions, so that gaps and neighbours are the route's; its
              hidden state has no channels
    padding   tokens of zeros among them
    order     (S,) or (B, S) which row of the tokens followed by the padding each step visits; None: as they are
    back      (L,) or (B, L) the step that visits each token
    """

    sequence: TokenSequence
    padding: int = 0
    order: Tensor | None = None
    back: Tensor | None = None

    def along(self, values: Tensor) -> Tensor:
        """`values` of the tokens (B, L, c) in the order of the steps, (B, S, c)."""
        if self.padding:
            values = functional.pad(values, (0, 0, 0, self.padding))
        return values if self.order is None else reorder(values, self.order)

    def home(self, values: Tensor) -> Tensor:
        """`values` of the steps (B, S, c) at the tokens' own places, (B, L, c)."""
        return values if self.back is None else reorder(values, self.back)


_PATH = Derivation[Path]("path")


def path(sequence: TokenSequence, direction: str) -> Path:
    """The way of `direction` through `sequence`."""
    return sequence.geometry.once(_PATH, lambda: _path(sequence, direction), direction)


def _path(sequence: TokenSequence, direction: str) -> Path:
    if direction == "h":
        return Path(sequence)
    route, padding = steps(direction, sequence.patch_grid, sequence.protected, sequence.positions.device)
    tokens, ranks, rows = _padded(sequence, len(route), padding), inverse(route), sequence.positions.shape[1]
    taken = visits(route, tokens)
    along = replace(
        tokens,
        hidden=reorder(tokens.hidden, taken.order),
        positions=taken.ranks.expand(tokens.positions.shape),
        size=None if tokens.size is None else reorder(tokens.size[..., None], taken.order)[..., 0],
        frozen=_ranked(sequence.frozen, ranks),
        context=_ranked(sequence.context, ranks),
        geometry=Geometry(),
    )
    return Path(along, padding, taken.order, taken.back[..., :rows])


def steps(direction: str, grid: Grid, protected: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """(S,) the dense position that each step visits, and how many are padding: their positions follow the tokens'."""
    match = DIRECTION.fullmatch(direction)
    assert match is not None, direction
    tokens = math.prod(grid) + len(protected)
    places = patch_positions(grid, protected, device).view(grid) if protected else torch.arange(tokens, device=device)
    places, padding = places.view(grid), 0
    if match["window"] is not None:
        window = int(match["window"])
        down, right = -grid[0] % window, -grid[1] % window
        padding = (grid[0] + down) * (grid[1] + right) - math.prod(grid)
        places = functional.pad(places, (0, right, 0, down), value=-1)
        missing = (places < 0).flatten()
        places = torch.where(missing, tokens - 1 + missing.cumsum(0), places.flatten()).view(places.shape)
        places = places.unflatten(1, (-1, window)).unflatten(0, (-1, window)).transpose(1, 2)
    elif match["route"] == "v":
        places = places.t()
    route = places.flatten()
    if match["flip"]:
        route = route.flip(0)
    for position in protected:
        route = torch.cat((route[:position], route.new_tensor([position]), route[position:]))
    return route, padding


def _padded(sequence: TokenSequence, length: int, padding: int) -> TokenSequence:
    """The positions and sizes of `sequence` with those of `padding` tokens behind them, among `length` in all."""
    batch = len(sequence.positions)
    positions, size = sequence.positions, sequence.size
    hidden = sequence.hidden[..., :0]
    if padding:
        behind = torch.arange(length - padding, length, device=positions.device).expand(batch, -1)
        positions, hidden = torch.cat((positions, behind), dim=1), functional.pad(hidden, (0, 0, 0, padding))
        size = None if size is None else functional.pad(size, (0, padding), value=1.0)
    return TokenSequence(hidden, None, positions, length, size=size, pooled=sequence.pooled, merged=sequence.merged)


def _ranked(dropped: Dropped | None, ranks: Tensor) -> Dropped | None:
    """The positions and sizes of `dropped` on a route."""
    return None if dropped is None else Dropped(dropped.stream[..., :0], ranks[dropped.positions], dropped.size)
