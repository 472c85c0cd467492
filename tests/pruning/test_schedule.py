"""Schedules: counts by hand, the authors' rounding, and what does not fit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning import PruneSchedule, default_points


def test_one_ratio_applies_at_each_point() -> None:
    # 0.8 * 196 = 156.8 -> 157, 0.8 * 157 = 125.6 -> 126, 0.8 * 126 = 100.8 -> 101
    schedule = PruneSchedule.resolve(24, 196, points=[5, 10, 15], keep=0.8)
    assert schedule == PruneSchedule((5, 10, 15), (157, 126, 101))


def test_tokens_per_block_counts_protected_tokens() -> None:
    schedule = PruneSchedule.resolve(6, 196, points=[2, 4], tokens=[100, 1])
    assert schedule.tokens_per_block(6, 197, 1) == [197, 197, 101, 101, 2, 2]


def test_exact_products_are_not_rounded_up() -> None:
    assert PruneSchedule.resolve(4, 195, points=[1], keep=0.8).tokens == (156,)  # 0.8 * 195 is 156.00000000000003


def test_a_list_gives_one_ratio_a_point() -> None:
    assert PruneSchedule.resolve(12, 100, keep=[0.9, 0.5, 1.0]) == PruneSchedule((3, 6, 9), (90, 45, 45))


@pytest.mark.parametrize(
    ("depth", "points"), [(24, (6, 12, 18)), (12, (3, 6, 9)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,))]
)
def test_default_points_are_quarter_depths(depth: int, points: tuple[int, ...]) -> None:
    assert default_points(depth) == points


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
        PruneSchedule.resolve(12, 100, **arguments)  # type: ignore[arg-type]


def test_a_model_of_one_block_has_no_point() -> None:
    with pytest.raises(UsageError, match="rising order"):
        PruneSchedule.resolve(1, 100, keep=0.5)


@given(st.integers(2, 40), st.integers(1, 1000), st.floats(1e-3, 1))
def test_counts_fall_and_stay_positive(blocks: int, patches: int, keep: float) -> None:
    counts = PruneSchedule.resolve(blocks, patches, keep=keep).tokens
    assert all(1 <= after <= before for before, after in zip((patches, *counts), counts, strict=False))
