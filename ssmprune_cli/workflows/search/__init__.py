"""`ssmprune search`: the best recipe for each of several budgets."""

from __future__ import annotations

from ssmprune_cli.workflows.search.found import Found
from ssmprune_cli.workflows.search.trial import Limits
from ssmprune_cli.workflows.search.workflow import (
    Searches,
    SearchPlan,
    SearchResult,
    open_search,
    search,
    search_to_folder,
    state_file,
)

__all__ = [
    "Found",
    "Limits",
    "SearchPlan",
    "SearchResult",
    "Searches",
    "open_search",
    "search",
    "search_to_folder",
    "state_file",
]
