"""Trying pruned variants of one model: divergence, cost and time of each, kept in a resumable state."""

from __future__ import annotations

from ssmprune_cli.workflows.trials.budgets import Budget, Uniform
from ssmprune_cli.workflows.trials.candidates import Candidate, layouts, neighbours, uniform
from ssmprune_cli.workflows.trials.cost import Costs, check_budget, least, schedule_at, solve
from ssmprune_cli.workflows.trials.latency import LatencyBudget, check_latency
from ssmprune_cli.workflows.trials.measure import Distances, Measurements, load_images, run
from ssmprune_cli.workflows.trials.state import SavedState

__all__ = [
    "Budget",
    "Candidate",
    "Costs",
    "Distances",
    "LatencyBudget",
    "Measurements",
    "SavedState",
    "Uniform",
    "check_budget",
    "check_latency",
    "layouts",
    "least",
    "load_images",
    "neighbours",
    "run",
    "schedule_at",
    "solve",
    "uniform",
]
