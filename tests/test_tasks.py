"""What a task promises the rest: its data, its metric in numbers, its limits at their edges, and its words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ssmprune_cli.data import DATASETS, Batch
from ssmprune_cli.errors import LimitError, UsageError
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.preprocessing import Frame
from ssmprune_cli.report import AccuracyFacts, ModelAccuracy, Report
from ssmprune_cli.statistics import paired_interval, wilson_interval
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.tasks.classification import Classification
from ssmprune_cli.workflows.limits import Limits, enforce

TASK = Classification()


def accuracy(right: int, dense_right: int, gained: int, lost: int, count: int) -> AccuracyFacts:
    return AccuracyFacts(
        top1=right / count,
        top5=None,
        interval=wilson_interval(right, count),
        count=count,
        dense=ModelAccuracy(top1=dense_right / count, top5=None, interval=wilson_interval(dense_right, count)),
        difference=(gained - lost) / count,
        difference_interval=paired_interval(gained, lost, count),
        p_value=1.0,
    )


def test_every_family_and_every_dataset_has_a_task_and_every_task_a_section_of_the_report() -> None:
    for _, family in FAMILIES.items():
        config = next(iter(family.variants.values()), None) or family.config_class()
        with torch.device("meta"):
            assert family.build(config).task in TASKS
    assert {kind for _, task in TASKS.items() for kind in task.datasets} == set(DATASETS.names())
    assert {task.section for _, task in TASKS.items()} <= set(Report.model_fields)


def test_a_result_is_the_rank_of_the_right_class_and_ties_are_no_right_answers() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    batch = Batch(torch.zeros(3, 3, 4, 4), (1, 0, 1), (Frame((4, 4), (4, 4)),) * 3, ("a", "b", "c"))
    assert TASK.results(logits, batch) == [0, 2, 1]


def test_data_are_opened_by_suffix_and_another_tasks_kind_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.arange(2))
    assert len(TASK.open(tmp_path / "images.npz")) == 2
    with pytest.raises(UsageError, match="'ade20k' for classification"):
        TASK.open(tmp_path, "ade20k")


def test_every_limit_at_its_edge() -> None:
    """15 of 20 right, 16 before: a drop of 5 points, and 75 %."""
    compared = accuracy(15, 16, 1, 2, 20)
    limits = Limits(max_drop=5.0, min_accuracy=75, max_flops=0.5, max_latency_ratio=0.75, judge="estimate")
    at = limits.check(TASK, score=compared, comparison=compared, flops=0.5, latency_ratio=Estimate(0.75))
    assert [each.name for each in at] == ["max_drop", "min_accuracy", "max_flops", "max_latency_ratio"]
    assert all(each.holds for each in at)
    enforce(at)
    limits = Limits(max_drop=4.99, min_accuracy=75.01, max_flops=0.499, max_latency_ratio=0.749, judge="estimate")
    beyond = limits.check(TASK, score=compared, comparison=compared, flops=0.5, latency_ratio=Estimate(0.75))
    assert not any(each.holds for each in beyond)
    with pytest.raises(LimitError, match=r"(?s)--max-drop.*--min-accuracy.*--max-flops.*--max-latency-ratio"):
        enforce(beyond)


def test_the_interval_is_judged_unless_the_estimate_is_asked_for() -> None:
    """Twenty images prove little: a drop of 5 points may be one of 25."""
    compared = accuracy(15, 16, 1, 2, 20)
    low, high = paired_interval(1, 2, 20)
    estimate, interval = (
        Limits(max_drop=10, min_accuracy=70, judge=judge).check(TASK, score=compared, comparison=compared)
        for judge in ("estimate", "interval")
    )
    assert [each.holds for each in estimate] == [True, True] and [each.holds for each in interval] == [False, False]
    for drop in (estimate[0], interval[0]):
        assert drop.value == pytest.approx(5) and drop.interval == pytest.approx((-100 * high, -100 * low))
    assert [each.judged for each in (estimate[0], interval[0])] == ["estimate", "interval"]
    assert interval[0].statement == (
        f"top-1 fell by 5.00 points (95 % interval {-100 * high:.2f} to {-100 * low:.2f}, judged by its upper end); "
        "--max-drop allows 10"
    )
    edge = -100 * low
    assert Limits(max_drop=edge).check(TASK, score=compared, comparison=compared)[0].holds
    assert not Limits(max_drop=edge - 1e-6).check(TASK, score=compared, comparison=compared)[0].holds
    floor = 100 * wilson_interval(15, 20)[0]
    assert Limits(min_accuracy=floor).check(TASK, score=compared)[0].holds
    assert not Limits(min_accuracy=floor + 1e-6).check(TASK, score=compared)[0].holds


def test_what_is_not_known_is_not_judged_and_a_model_may_have_to_gain() -> None:
    (only,) = Limits(max_drop=1.0, max_flops=0.5).check(TASK, flops=0.4)
    assert only.name == "max_flops" and only.judged == "estimate"  # it has no interval
    gains = accuracy(18, 16, 2, 0, 20)
    assert Limits(max_drop=-10.0, judge="estimate").check(TASK, score=gains, comparison=gains)[0].holds


@pytest.mark.parametrize(
    "wrong",
    [{"max_drop": float("nan")}, {"min_accuracy": 101.0}, {"max_flops": -0.1}, {"max_latency_ratio": float("inf")}],
)
def test_a_limit_that_is_none_is_wrong_usage(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="must be a number"):
        Limits(**wrong)  # type: ignore[arg-type]
