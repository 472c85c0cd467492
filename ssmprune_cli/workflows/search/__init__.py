"""`ssmprune search`: the best recipe for each of several budgets."""

from __future__ import annotations

from ssmprune_cli.workflows.search.algorithm import Limits
from ssmprune_cli.workflows.search.workflow import SearchPlan, SearchResult, search

__all__ = ["Limits", "SearchPlan", "SearchResult", "search"]
