"""Where tokens are dropped, and how many stay: the same for every image, so shapes are static."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssmprune_cli.errors import UsageError


@dataclass(frozen=True)
class PruneSchedule:
    """After `points[i]` blocks, `tokens[i]` patch tokens stay (protected tokens are not counted; they always stay)."""

    points: tuple[int, ...]
    tokens: tuple[int, ...]

    @classmethod
    def resolve(
        cls,
        num_blocks: int,
        num_patches: int,
        *,
        points: Sequence[int] | None = None,
        keep: float | Sequence[float] | None = None,
        tokens: Sequence[int] | None = None,
    ) -> PruneSchedule:
        """The schedule for a model of `num_blocks` blocks and `num_patches` patch tokens.

        keep    ratio of patch tokens kept *at each point* (the literature's keep rate), one number or one a point
        tokens  instead of `keep`: patch tokens that stay after each point
        points  numbers of blocks; by default a quarter, half and three quarters of the depth

        Raises UsageError when they do not fit the model or one another.
        """
        if points is None:
            points = default_points(num_blocks)
        where = f"prune points {list(points)}"
        if not points or list(points) != sorted(set(points)):
            raise UsageError("must be one or more block numbers in rising order", where=where)
        if points[0] < 1 or points[-1] >= num_blocks:
            raise UsageError(
                f"the model has {num_blocks} blocks, so a point lies between 1 and {num_blocks - 1}", where=where
            )
        if (keep is None) == (tokens is None):
            raise UsageError("give either a keep ratio or token counts, and not both")
        if tokens is None:
            ratios = [float(keep)] * len(points) if isinstance(keep, int | float) else list(keep or ())
            tokens = _counts(ratios, num_patches)
        if len(tokens) != len(points):
            raise UsageError(f"{len(tokens)} values for {len(points)} points", where=where)
        before = num_patches
        for count in tokens:
            if not 1 <= count <= before:
                raise UsageError(f"cannot keep {count} of {before} patch tokens", where=f"token counts {list(tokens)}")
            before = count
        return cls(tuple(points), tuple(tokens))

    def tokens_per_block(self, num_blocks: int, num_tokens: int, num_protected: int) -> list[int]:
        """Length of the sequence that enters each block, protected tokens included."""
        lengths, current = [], num_tokens
        for block in range(num_blocks):
            if block in self.points:
                current = self.tokens[self.points.index(block)] + num_protected
            lengths.append(current)
        return lengths


def default_points(num_blocks: int) -> tuple[int, ...]:
    """A quarter, half and three quarters of the depth."""
    points = sorted({max(1, num_blocks * quarter // 4) for quarter in (1, 2, 3)})
    return tuple(point for point in points if point < num_blocks)


def _counts(ratios: Sequence[float], num_patches: int) -> list[int]:
    counts, current = [], num_patches
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise UsageError(f"a keep ratio lies above 0 and at most at 1, not {ratio:g}")
        # Rounded up as the authors do; the epsilon keeps 0.8 * 195 (156.00000000000003 in floating point) at 156.
        current = max(1, math.ceil(current * ratio - 1e-9))
        counts.append(current)
    return counts
