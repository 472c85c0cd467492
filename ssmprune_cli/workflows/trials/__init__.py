"""Trying pruned variants of one model: divergence, cost and time of each, kept in a resumable state."""

from __future__ import annotations

from ssmprune_cli.workflows.trials.budgets import Budget, Spending, Uniform
from ssmprune_cli.workflows.trials.candidates import Candidate, layouts, neighbours, uniform
from ssmprune_cli.workflows.trials.clock import Clock, TimeTable, Timing, check_time, nothing_dropped
from ssmprune_cli.workflows.trials.cost import Costs, Spends, check_budget, schedule_at, solve
from ssmprune_cli.workflows.trials.measure import (
    Distances,
    Images,
    Measurements,
    Prepared,
    Variant,
    in_batches,
    load_images,
    run,
    sampled,
    task_of,
)
from ssmprune_cli.workflows.trials.state import SavedState

__all__ = [
    "Budget",
    "Candidate",
    "Clock",
    "Costs",
    "Distances",
    "Images",
    "Measurements",
    "Prepared",
    "SavedState",
    "Spending",
    "Spends",
    "TimeTable",
    "Timing",
    "Uniform",
    "Variant",
    "check_budget",
    "check_time",
    "in_batches",
    "layouts",
    "load_images",
    "neighbours",
    "nothing_dropped",
    "run",
    "sampled",
    "schedule_at",
    "solve",
    "task_of",
    "uniform",
]
