"""Which scan directions each block of a model of LocalMamba has. They are in no weight (hunto/LocalMamba 75e5d1f)."""

from __future__ import annotations

from collections.abc import Mapping

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models.common import Hints
from ssmprune_cli.models.mamba.local_routes import DIRECTION

Directions = tuple[tuple[str, ...], ...]  # of each block: rows `h`, columns `v`, windows `w7`; `_flip` is the way back
WINDOWS = ("h", "h_flip", "w2", "w2_flip")  # of every block of a model without search


def checked_directions(directions: Directions, depth: int) -> Directions:
    """As tuples, of `WINDOWS` in every block where none are said. UsageError unless they suit `depth` blocks."""
    directions = tuple(tuple(each) for each in directions) or (WINDOWS,) * depth  # lists from JSON
    if len(directions) != depth or not all(directions):
        raise UsageError(f"{depth} blocks need directions each, not {len(directions)} lists of them")
    unknown = [name for names in directions for name in names if not DIRECTION.fullmatch(name)]
    if unknown:
        raise UsageError(f"no scan has the direction {listing(sorted(set(unknown)))}")
    return directions


def settled_directions(hints: Hints, fitting: Mapping[str, Directions]) -> Directions:
    """As the file states, else those of the one published model that is `fitting`, by name. CheckpointError without."""
    stated = hints.settings.get("directions", ())
    if len(stated) == 1 and isinstance(stated[0], tuple):
        directions: Directions = stated[0]
        return directions
    if stated:
        raise CheckpointError(f"the file says that directions are {listing(stated)}, which is no list for each block")
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    what = "neither the weights nor the file say which directions the scans have, and other ones give wrong answers"
    if fitting:
        choices = " or ".join(f"`--variant {name}`" for name in fitting)
        hint = f"Give {choices}: the right one has the published accuracy (`ssmprune eval`)."
    else:
        hint = "Save the file with them: {'model': weights, 'args': {'directions': [['h', 'v_flip', ...], ...]}}."
    raise CheckpointError(what, hint=hint)


def searched(*blocks: str) -> Directions:
    """The directions of each block, said with spaces between them."""
    return tuple(tuple(block.split()) for block in blocks)
