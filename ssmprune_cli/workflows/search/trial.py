"""What a search tried, and how long it may go on."""

from __future__ import annotations

from dataclasses import dataclass

from ssmprune_cli.models import WHOLE, Size
from ssmprune_cli.pruning import PruneSettings
from ssmprune_cli.workflows.trials import Timing


@dataclass(frozen=True)
class Trial:
    """What was tried.

    spent          share of the dense multiply-adds or time, as the budget is: predicted, measured for finalists
    multiply_adds  share of the dense model's; in a search by time, of finalists only
    divergence     in nats on the search images (all of them), after a quick repair if candidates got one
    held_back      of finalists, in nats on the images held back, not repaired
    repaired       of finalists, if they were repaired: in nats on images that neither that nor the search has seen
    timing         of finalists, beside the dense model
    size           of the model that tokens were dropped from
    """

    settings: PruneSettings
    spent: float
    multiply_adds: float | None
    divergence: float
    held_back: float | None = None
    chosen: bool = False
    timing: Timing | None = None
    size: Size = WHOLE
    repaired: float | None = None


@dataclass(frozen=True)
class Limits:
    """evaluations: of candidates on all search images, or as many on parts of them; seconds: None is no limit.

    The finalists are always measured.
    """

    evaluations: int = 200
    seconds: float | None = None
