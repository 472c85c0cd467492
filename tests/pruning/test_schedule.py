"""Schedules: counts by hand, the authors' rounding, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Stage
from ssmprune_cli.pruning import PruneSchedule, default_points

# Three stages of 2, 5 and 2 blocks: 64, 16 and 4 patches, the last with a protected token.
STAGES = (Stage(0, 2, (8, 8)), Stage(2, 7, (4, 4)), Stage(7, 9, (2, 2), (1,)))


def one_stage(blocks: int, patches: int, protected: tuple[int, ...] = ()) -> tuple[Stage, ...]:
    return (Stage(0, blocks, (1, patches), protected),)


def test_one_ratio_applies_at_each_point() -> None:
    # 0.8 * 196 = 156.8 -> 157, 0.8 * 157 = 125.6 -> 126, 0.8 * 126 = 100.8 -> 101
    schedule = PruneSchedule.resolve(one_stage(24, 196), points=[5, 10, 15], keep=0.8)
    assert schedule == PruneSchedule((5, 10, 15), (157, 126, 101))


def test_tokens_per_block_counts_protected_tokens() -> None:
    stages = one_stage(6, 196, protected=(98,))
    schedule = PruneSchedule.resolve(stages, points=[2, 4], tokens=[100, 1])
    assert schedule.tokens_per_block(stages) == (197, 197, 101, 101, 2, 2)
    assert list(schedule.blocks_after_points(stages)) == [2, 3, 4, 5]


def test_by_default_the_longest_stage_is_pruned() -> None:
    assert default_points(STAGES) == (3, 4, 5)
    assert default_points((Stage(0, 2, (8, 8)), Stage(2, 10, (4, 4)), Stage(10, 12, (2, 2)))) == (4, 6, 8)


def test_every_stage_starts_with_all_tokens() -> None:
    schedule = PruneSchedule.resolve(STAGES, points=[1, 3, 5, 8], keep=0.5)
    assert schedule == PruneSchedule((1, 3, 5, 8), (32, 8, 4, 2))
    assert schedule.patches_per_block(STAGES) == (64, 32, 16, 8, 8, 4, 4, 4, 2)
    assert schedule.tokens_per_block(STAGES) == (64, 32, 16, 8, 8, 4, 4, 5, 3)
    assert list(schedule.blocks_after_points(STAGES)) == [1, 3, 4, 5, 6, 8]


def test_tokens_may_rise_from_stage_to_stage_only() -> None:
    assert PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[5, 9]).tokens == (5, 9)
    with pytest.raises(UsageError, match="cannot keep 9 of 5"):
        PruneSchedule.resolve(STAGES, points=[3, 4], tokens=[5, 9])
    with pytest.raises(UsageError, match="cannot keep 17 of 16"):
        PruneSchedule.resolve(STAGES, points=[1, 3], tokens=[30, 17])


@pytest.mark.parametrize("points", [[2], [1, 7], [2, 3, 7]])
def test_a_point_at_the_end_of_a_stage_is_refused(points: list[int]) -> None:
    with pytest.raises(UsageError, match="a stage ends") as caught:
        PruneSchedule.resolve(STAGES, points=points, keep=0.5)
    assert caught.value.hint == "Possible points: 1, 3 to 6, 8."


def test_exact_products_are_not_rounded_up() -> None:
    assert PruneSchedule.resolve(one_stage(4, 195), points=[1], keep=0.8).tokens == (
        156,
    )  # 0.8 * 195 is 156.00000000000003


def test_a_list_gives_one_ratio_a_point() -> None:
    assert PruneSchedule.resolve(one_stage(12, 100), keep=[0.9, 0.5, 1.0]) == PruneSchedule((3, 6, 9), (90, 45, 45))


@pytest.mark.parametrize(
    ("depth", "points"), [(24, (6, 12, 18)), (12, (3, 6, 9)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,))]
)
def test_default_points_are_quarter_depths(depth: int, points: tuple[int, ...]) -> None:
    assert default_points(one_stage(depth, 9)) == points


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"points": [0], "keep": 0.5}, "between 1 and 11"),
        ({"points": [12], "keep": 0.5}, "between 1 and 11"),
        ({"points": [4, 4], "keep": 0.5}, "rising order"),
        ({"points": [], "keep": 0.5}, "rising order"),
        ({"keep": 0.0}, "above 0"),
        ({"keep": 1.01}, "above 0"),
        ({"keep": [0.5, 0.5]}, "2 values for 3 points"),
        ({"points": [3, 6], "tokens": [50, 60]}, "cannot keep 60 of 50"),
        ({"points": [3], "tokens": [0]}, "cannot keep 0 of 100"),
        ({"points": [3]}, "either a keep ratio or token counts"),
        ({"points": [3], "keep": 0.5, "tokens": [3]}, "either a keep ratio or token counts"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PruneSchedule.resolve(one_stage(12, 100), **arguments)  # type: ignore[arg-type]


def test_a_model_of_one_block_has_no_point() -> None:
    with pytest.raises(UsageError, match="rising order"):
        PruneSchedule.resolve(one_stage(1, 100), keep=0.5)


@given(st.integers(2, 40), st.integers(1, 1000), st.floats(1e-3, 1))
def test_counts_fall_and_stay_positive(blocks: int, patches: int, keep: float) -> None:
    counts = PruneSchedule.resolve(one_stage(blocks, patches), keep=keep).tokens
    assert all(1 <= after <= before for before, after in zip((patches, *counts), counts, strict=False))
