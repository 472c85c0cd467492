"""Grids of tokens that shrink as wholes: which size a count gives, and what became of the places of the dense grid.

Letters: B batch, G places of the dense grid, K tokens of the grid now.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

Grid = tuple[int, int]

_ASPECT = 0.5  # how much more a change of the aspect ratio weighs than the same loss of tokens


def fitting(grid: Grid, count: int) -> Grid:
    """The rows and columns of the grid of at most `count` tokens (1 or more) that `grid` is best merged into.

    As many tokens as there may be, at an aspect ratio near that of `grid`. What fits so is the best for its own count.
    """

    def worth(rows: int, columns: int) -> tuple[float, int]:
        change = abs(math.log(rows * grid[1] / (columns * grid[0])))
        return round(math.log(rows * columns) - _ASPECT * change, 9), min(rows, columns)  # of equals, the squarer one

    sides = [(rows, min(grid[1], count // rows)) for rows in range(1, min(grid[0], count) + 1)]
    return max(sides, key=lambda side: worth(*side))


def divided(grid: Grid, stride: int) -> Grid:
    """Rows and columns after a downsampling by `stride`, rounded up."""
    return -(-grid[0] // stride), -(-grid[1] // stride)


@dataclass(frozen=True)
class Merged:
    """What became of the places of a dense grid whose tokens were merged into those of a smaller grid.

    grid       rows and columns of the dense grid
    protected  positions of protected tokens in the dense sequence
    owner      (B, G) int64 the patch token, counted in raster order of the grid now, that took in each place
    """

    grid: Grid
    protected: tuple[int, ...]
    owner: Tensor

    def moved(self, into: Tensor) -> Merged:
        """After one more merge, of each patch token into the one that `into` (B, tokens before) names."""
        return replace(self, owner=into.gather(1, self.owner))

    def divided(self, grid: Grid, stride: int) -> Merged:
        """After a downsampling by `stride`, in which the tokens were `grid`: a place goes with the first one of its
        square in the dense grid."""
        rows, columns = divided(self.grid, stride)
        device = self.owner.device
        row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
        first = self.owner[:, (stride * row[:, None] * self.grid[1] + stride * column).flatten()]
        width = divided(grid, stride)[1]
        owner = first // grid[1] // stride * width + first % grid[1] // stride
        return Merged((rows, columns), self.protected, owner)

    def dense_positions(self, count: int) -> Tensor:
        """(B, count) position in the dense sequence of each of `count` patch tokens: of the places that it took in, in
        raster order, the middle one."""
        order = self.owner.argsort(dim=1, stable=True)
        sizes = self.owner.new_zeros(order.shape[0], count).scatter_add(1, self.owner, torch.ones_like(self.owner))
        middle = sizes.cumsum(dim=1) - sizes + (sizes - 1).clamp(min=0) // 2
        place = order.gather(1, middle.clamp(max=order.shape[1] - 1))
        return patch_positions(self.grid, self.protected, order.device)[place]


def patch_positions(grid: Grid, protected: Sequence[int], device: torch.device) -> Tensor:
    """(G,) positions of the patch tokens of `grid` in a sequence with tokens at the positions `protected` besides."""
    taken = set(protected)
    open_positions = [each for each in range(math.prod(grid) + len(taken)) if each not in taken]
    return torch.tensor(open_positions, device=device)


def protected_positions(protected: Sequence[int], before: Grid, after: Grid) -> tuple[int, ...]:
    """Where protected tokens stand in a sequence of patch tokens that were `before` and are `after`.

    The same share of rows and columns goes first. One between two rows stays between two: a class token in the middle
    of a row costs a Vim three times the divergence.
    """
    found: list[int] = []
    for number, place in enumerate(protected):
        row, column = divmod(place - number, before[1])  # of the patch token that comes next
        rows = (2 * row * after[0] + before[0] - 1) // (2 * before[0])  # rounded, of two the lower
        if column:
            rows = row * after[0] // before[0]
        rank = rows * after[1] + (2 * column * after[1] + before[1] - 1) // (2 * before[1])
        found.append(max(rank + number, found[-1] + 1 if found else 0))
    return tuple(found)


@dataclass(frozen=True)
class Pairs:
    """Which neighbours along an axis of a grid become one token. Lines are rows or columns, n their cells before.

    near, far  (B, lines, cells after) the one or two cells that each cell is made of, of one twice the same
    into       (B, lines, n) the cell that each cell goes into
    """

    near: Tensor
    far: Tensor
    into: Tensor

    @classmethod
    def of(cls, first: Tensor, cells: int, after: int) -> Pairs:
        """`first` (B, lines, cells - after): the first cell of each pair; pairs do not overlap."""
        second = first.new_zeros(*first.shape[:2], cells).scatter(2, first + 1, 1)
        near = second.argsort(dim=2, stable=True)[:, :, :after]  # ascending, as the sort is stable
        return cls(near, near + functional.pad(second[:, :, 1:], (0, 1)).gather(2, near), (1 - second).cumsum(2) - 1)


def gaps_by_size(size: Tensor) -> Tensor:
    """(B, L) dense tokens between the centres of each token and of the one before it, less one, if each of `size`
    (B, L) stands in the middle of as many. The first token of a scan gets 0. Sizes below one leave no gap."""
    half = (size - 1) / 2
    return functional.pad((half[:, 1:] + half[:, :-1]).clamp(min=0), (1, 0))
