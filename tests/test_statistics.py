"""Intervals and the paired test against published values and brute force."""

from __future__ import annotations

import math

import pytest

from ssmprune_cli.statistics import mcnemar_p_value, paired_interval, ratio_of_medians, wilson_interval


@pytest.mark.parametrize(
    ("successes", "count", "expected"),
    [
        # Newcombe (1998, Statistics in Medicine 17:857), table I, method 3; printed to 4 digits.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson(successes: int, count: int, expected: tuple[float, float]) -> None:
    assert wilson_interval(successes, count) == pytest.approx(expected, abs=5e-5)
    low, high = wilson_interval(count - successes, count)
    assert (1 - high, 1 - low) == pytest.approx(expected, abs=5e-5)


def test_wilson_stays_in_range() -> None:
    for count in (1, 7, 50_000):
        assert wilson_interval(0, count)[0] == 0.0
        assert wilson_interval(count, count)[1] == 1.0


def test_paired_interval_of_published_example() -> None:
    # Fagerland, Lydersen and Laake (2014, Statistics in Medicine 33:2850): 21 cases, 1 against 7; printed to 3 digits.
    assert paired_interval(1, 7, 21) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert paired_interval(7, 1, 21) == pytest.approx((0.026, 0.517), abs=5e-4)


@pytest.mark.parametrize("count", [1, 100, 50_000])
def test_paired_interval_without_differences(count: int) -> None:
    """The score equation then has the closed solution z^2 / (n + z^2)."""
    half = 1.959964**2 / (count + 1.959964**2)
    assert paired_interval(0, 0, count) == pytest.approx((-half, half), rel=1e-6)


@pytest.mark.parametrize(("gained", "lost", "count"), [(500, 700, 50_000), (3000, 3100, 10_000)])
def test_paired_interval_nears_the_normal_one(gained: int, lost: int, count: int) -> None:
    difference = (gained - lost) / count
    half = 1.959964 * math.sqrt(gained + lost - (gained - lost) ** 2 / count) / count
    # The score method differs from the normal one by terms of order 1 / count.
    assert paired_interval(gained, lost, count) == pytest.approx((difference - half, difference + half), abs=4 / count)


@pytest.mark.parametrize(("gained", "lost", "count"), [(10, 0, 10), (0, 10, 10), (3, 0, 10), (1, 0, 1)])
def test_paired_interval_at_the_ends(gained: int, lost: int, count: int) -> None:
    low, high = paired_interval(gained, lost, count)
    assert -1 <= low <= (gained - lost) / count <= high <= 1
    assert low < high


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (1, 0), (1, 7), (5, 5), (3, 12), (12, 3)])
def test_mcnemar_is_the_sum_of_no_more_likely_outcomes(gained: int, lost: int) -> None:
    total = gained + lost
    expected = sum(math.comb(total, k) for k in range(total + 1) if abs(2 * k - total) >= abs(gained - lost)) / 2**total
    assert mcnemar_p_value(gained, lost) == pytest.approx(expected, rel=1e-12)


def test_mcnemar_of_large_counts() -> None:
    # Normal approximation with continuity correction: z = 99 / sqrt(10000); p to about 1 %.
    assert mcnemar_p_value(5050, 4950) == pytest.approx(math.erfc(0.99 / math.sqrt(2)), rel=0.01)
    assert mcnemar_p_value(0, 1000) == 2.0**-999  # whole numbers to the end: no underflow on the way


def test_a_ratio_of_times_is_that_of_the_medians_that_are_shown() -> None:
    """Medians 57.2 and 57.5 ms are +0.5 %, though the median of the rounds' own ratios is +6.1 %."""
    before, after = [57.2, 50.0, 65.0], [57.5, 60.0, 57.0]
    ratio, (low, high) = ratio_of_medians(before, after)
    assert ratio == 57.5 / 57.2 and low <= ratio <= high
    assert ratio_of_medians(before, after) == (ratio, (low, high))  # deterministic


def test_the_interval_of_a_ratio_of_times() -> None:
    """Pairs are drawn together: what slows both models does not widen it. One turn tells nothing of the spread."""
    slow = [1.0, 2.0, 4.0, 8.0, 3.0]
    assert ratio_of_medians(slow, [0.5 * each for each in slow]) == (0.5, (0.5, 0.5))
    ratio, (low, high) = ratio_of_medians([1.0] * 10, [0.8, 0.9, 1.0, 1.1, 1.2, 0.85, 0.95, 1.05, 1.15, 1.0])
    assert 0.8 <= low < ratio < high <= 1.2
    assert ratio_of_medians([2.0], [1.0]) == (0.5, (0.5, 0.5))
