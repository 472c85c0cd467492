"""With what value a dropped token comes back, where a model makes the grid whole again.

`left`: the value with which it left. `nearest`: that of the kept token which is nearest in scan position. `blend`: a
part of both. That part is a number for each prune point, by least squares on calibration images: how the tokens that
are missing then come nearest, in the last block before the next point, to what they are in the dense model.

The nearest token alone is a poor guess: its share comes out at 0.05 to 0.35, the more the longer a token is gone. It
lowered the mean divergence of `benchmarks/vmamba_cifar10.pth` (reduction `context`, fitted to 64 images, on 186 others)
from 0.218 to 0.157 at keep 0.7, and from 0.379 to 0.321 at keep 0.5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Stage, Wanted, at_least_tokens
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.tokens import TokenSequence


def fit_returning(model: Prunable, pruner: TokenPruner, batches: Iterable[Tensor]) -> dict[int, float]:
    """Give `pruner` the share of the nearest token for each of its points, by `batches` of normalised images: from 0,
    what is best without it, to 1."""
    last = last_blocks(pruner.dropping_points, model.stages)
    dense, pruned, installed = _Watch(None, last), _Watch(pruner, last), model.pruner
    products: dict[int, Tensor] = {}
    try:
        with torch.inference_mode():
            for batch in batches:
                for watch in (dense, pruned):
                    model.pruner = watch
                    model.observe(batch)
                for block, point in last.items():
                    found = _products(dense.seen[block], pruned.seen[block])
                    products[point] = products.get(point, torch.zeros_like(found)) + found
    finally:
        model.pruner = installed
    shares = {
        point: float((wanted / all_of_it).clamp(0, 1)) if all_of_it > 0 else 0.0
        for point, (wanted, all_of_it) in products.items()
    }
    pruner.set_returning(shares)
    return shares


def last_blocks(points: Sequence[int], stages: Sequence[Stage]) -> dict[int, int]:
    """For each of `points` the last block that lacks just what has been dropped until then: block to point."""
    ends = {stage.stop for stage in stages}
    return {min(end for end in (*ends, *points) if end > point) - 1: point for point in points}


class _Watch(nn.Module, Pruner):
    """Prunes as `inner`, or not at all, and keeps the tokens before the pruner behind some blocks."""

    def __init__(self, inner: TokenPruner | None, blocks: Iterable[int]) -> None:
        super().__init__()
        self.inner, self.blocks = inner, frozenset(blocks)
        self.seen: dict[int, TokenSequence] = {}

    def wants(self, block: int) -> Wanted:
        wanted: Wanted = "nothing" if self.inner is None else self.inner.wants(block)
        return at_least_tokens(wanted) if block in self.blocks else wanted

    def alignment(self, block: int) -> ScanAlignment | None:
        return None if self.inner is None else self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if block in self.blocks:
            self.seen[block] = sequence
        if self.inner is None:
            return sequence
        after: TokenSequence = self.inner(block, sequence, statistics)
        return after


def _products(dense: TokenSequence, pruned: TokenSequence) -> Tensor:
    """(2,) float64: of the change from each missing token's value as it left to the nearest one's, the product with the
    change to its value in the dense model, and with itself."""
    left, nearest = (replace(pruned, returning=share).restored().hidden.double() for share in (None, 1.0))
    change = nearest - left  # zero where a token is there
    return torch.stack([(change * (dense.hidden.double() - left)).sum(), change.square().sum()])
