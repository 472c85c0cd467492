"""Merge neighbours of the grid in pairs, the same count in every row and column, so that a smaller whole grid is left.

Dense convolutions, routes, windows and downsampling run on it unchanged. The idea of STORM (arXiv 2606.19932), from its
description. First neighbours within each row: the row is cut into as many windows of nearly equal length as cells have
to go, and in each the two most similar neighbours (cosine of the residual streams; of equals the first) become their
mean, weighted by size. So a cell moves by less than a window, and columns stay nearly straight. Then likewise within
each column. At most half of the cells can go in a round along an axis; there are as many rounds as it takes. The score
is not used, and protected tokens stay as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.grids import fitting
from ssmprune_cli.pruning.reduction.base import Reduction
from ssmprune_cli.tokens import TokenSequence


def _apply(sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    goal = fitting(sequence.patch_grid, count - len(sequence.protected))
    for axis in (1, 0):
        while (cells := sequence.patch_grid[axis]) > goal[axis]:
            pairs = min(cells - goal[axis], cells // 2)
            sequence = sequence.merge_neighbours(axis, _most_similar(sequence, axis, pairs), cells - pairs)
    return sequence


def _most_similar(sequence: TokenSequence, axis: int, windows: int) -> Tensor:
    """(B, lines, windows): in each window of each row (axis 1) or column (axis 0) the first of the most similar two."""
    tokens = sequence.patches()  # (B, rows, columns, d)
    tokens = tokens if axis else tokens.transpose(1, 2)
    likeness = functional.cosine_similarity(tokens[:, :, :-1], tokens[:, :, 1:], dim=-1)  # (B, lines, cells - 1)
    cells = tokens.shape[2]
    edges = [(number * cells // windows, (number + 1) * cells // windows) for number in range(windows)]
    longest = max(stop - start for start, stop in edges) - 1
    # The pairs of a shorter window are filled up with its last one, which comes too late to be the first of equals.
    pairs = [[min(start + pair, stop - 2) for pair in range(longest)] for start, stop in edges]
    places = torch.tensor(pairs, device=likeness.device)  # (windows, pairs)
    best = likeness[:, :, places].argmax(dim=3, keepdim=True)
    return places.expand(*best.shape[:3], -1).gather(3, best)[..., 0]


GRID_MERGE = Reduction(_apply, aligned=True, shortens=True, sized=True, rectangular=True)
