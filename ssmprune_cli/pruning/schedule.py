"""Where tokens are dropped, and how many stay: the same for every image, so shapes are static."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ssmprune_cli.errors import UsageError
from ssmprune_cli.grids import Grid, divided, fitting
from ssmprune_cli.interface import Stage


@dataclass(frozen=True)
class PruneSchedule:
    """After `points[i]` blocks, `tokens[i]` patch tokens stay (protected tokens are not counted; they always stay).

    Every stage begins with all of its tokens, so a point counts for the blocks that follow it in its own stage.

    grids  of a rectangular reduction, rows and columns after each point, as many as `tokens` says; else empty.
           A stage then begins with what the downsampling makes of the grid before it, so a point counts for all blocks
           that follow, and may lie at the end of a stage.
    """

    points: tuple[int, ...]
    tokens: tuple[int, ...]
    grids: tuple[Grid, ...] = ()

    @classmethod
    def resolve(
        cls,
        stages: Sequence[Stage],
        *,
        points: Sequence[int] | None = None,
        keep: float | Sequence[float] | None = None,
        tokens: Sequence[int] | None = None,
        rectangular: bool = False,
    ) -> PruneSchedule:
        """The schedule for a model of these `stages`.

        keep    ratio of patch tokens kept *at each point* (the literature's keep rate), one number or one a point: of
                all tokens at the first point of a stage, of those that are left at the next ones
        tokens  instead of `keep`: patch tokens that stay after each point
        points  numbers of blocks; see `default_points`
        rectangular  each count is rounded down to that of a grid, see `fitting`

        Raises UsageError when they do not fit the model or one another.
        """
        if points is None:
            points = default_points(stages)
        where = f"prune points {list(points)}"
        if not points or list(points) != sorted(set(points)):
            raise UsageError("must be one or more block numbers in rising order", where=where)
        _check_places(points, stages, where, ends=rectangular)
        if (keep is None) == (tokens is None):
            raise UsageError("give either a keep ratio or token counts, and not both")
        values = [float(keep)] * len(points) if isinstance(keep, int | float) else list(keep or tokens or ())
        if len(values) != len(points):
            raise UsageError(f"{len(values)} values for {len(points)} points", where=where)
        schedule = cls((), ())
        for point, value in zip(points, values, strict=True):
            before = schedule.patches_per_block(stages)[point - 1]
            count = int(value) if keep is None else _count(value, before)
            if not 1 <= count <= before:
                raise UsageError(f"cannot keep {count} of {before} patch tokens", where=f"token counts {list(values)}")
            schedule = schedule.then(point, count, stages, rectangular=rectangular)
        return schedule

    def then(self, point: int, count: int, stages: Sequence[Stage], *, rectangular: bool) -> PruneSchedule:
        """This schedule with one more point, behind all others, and `count` tokens there, or as many as make a grid."""
        points = (*self.points, point)
        if not rectangular:
            return PruneSchedule(points, (*self.tokens, count))
        if stages[0].frames > 1:
            raise UsageError(
                f"a reduction that merges the grid of an image is not for the tokens of {stages[0].frames} frames",
                hint="Others, such as drop, frozen or local-merge, are.",
            )
        grid = fitting(self.grids_per_block(stages)[point - 1], count)
        return PruneSchedule(points, (*self.tokens, math.prod(grid)), (*self.grids, grid))

    def shortens(self, stages: Sequence[Stage]) -> bool:
        """Whether any token is dropped."""
        full = tuple(stage.num_patches for stage in stages for _ in range(stage.start, stage.stop))
        return self.patches_per_block(stages) != full

    def patches_per_block(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Patch tokens that enter each block."""
        if self.grids:
            return tuple(math.prod(grid) for grid in self.grids_per_block(stages))
        kept = dict(zip(self.points, self.tokens, strict=True))
        lengths = []
        for stage in stages:
            current = stage.num_patches
            for block in range(stage.start, stage.stop):
                current = kept.get(block, current)
                lengths.append(current)
        return tuple(lengths)

    def grids_per_block(self, stages: Sequence[Stage]) -> tuple[Grid, ...]:
        """Rows and columns of the grid that enters each block, for a rectangular reduction."""
        after = dict(zip(self.points, self.grids, strict=True))
        found: list[Grid] = []
        for stage in stages:
            grid = divided(after.get(stage.start, found[-1]), stage.stride) if found else stage.grid
            for block in range(stage.start, stage.stop):
                grid = grid if block == stage.start else after.get(block, grid)
                found.append(grid)
        return tuple(found)

    def tokens_per_block(self, stages: Sequence[Stage]) -> tuple[int, ...]:
        """Length of the sequence that enters each block, protected tokens included."""
        protected = [len(stage.protected) for stage in stages for _ in range(stage.start, stage.stop)]
        return tuple(map(sum, zip(self.patches_per_block(stages), protected, strict=True)))

    def blocks_after_points(self, stages: Sequence[Stage]) -> Iterator[int]:
        """The blocks that may lack tokens: those after a point of their own stage; on a smaller grid, after any."""
        if self.grids:
            yield from range(self.points[0], stages[-1].stop)
            return
        for stage in stages:
            inside = [point for point in self.points if stage.start < point < stage.stop]
            yield from range(min(inside, default=stage.stop), stage.stop)


def default_points(stages: Sequence[Stage]) -> tuple[int, ...]:
    """A quarter, half and three quarters of the depth of the stage with the most blocks."""
    longest = max(stages, key=lambda stage: stage.stop - stage.start)
    depth = longest.stop - longest.start
    points = sorted({max(1, depth * quarter // 4) for quarter in (1, 2, 3)})
    return tuple(longest.start + point for point in points if point < depth)


def share(count: int, whole: int, now: int) -> int:
    """Of a grid of `now` tokens as many as `count` are of `whole`, rounded to the nearest, a half up; at least one."""
    return max(1, (2 * count * now + whole) // (2 * whole))


def _check_places(points: Sequence[int], stages: Sequence[Stage], where: str, *, ends: bool) -> None:
    """`ends`: whether a point may lie at the end of a stage."""
    num_blocks = stages[-1].stop
    if points[0] < 1 or points[-1] >= num_blocks:
        raise UsageError(
            f"the model has {num_blocks} blocks, so a point lies between 1 and {num_blocks - 1}", where=where
        )
    last = [str(point) for point in points if point in {stage.start for stage in stages} and not ends]
    if last:
        inside = [range(stage.start + 1, stage.stop) for stage in stages if stage.stop - stage.start > 1]
        possible = ", ".join(f"{each[0]} to {each[-1]}" if len(each) > 1 else str(each[0]) for each in inside)
        raise UsageError(
            f"after {' and '.join(last)} blocks a stage ends, and the next one starts with all tokens",
            where=where,
            hint=f"Possible points: {possible or 'none'}.",
        )


def _count(ratio: float, before: int) -> int:
    if not 0 < ratio <= 1:
        raise UsageError(f"a keep ratio lies above 0 and at most at 1, not {ratio:g}")
    # Rounded up as the authors do; the epsilon keeps 0.8 * 195 (156.00000000000003 in floating point) at 156.
    return max(1, math.ceil(before * ratio - 1e-9))
