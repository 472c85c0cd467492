"""`compress` for an Adapter: blocks run on the tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ssmprune_cli.adapt.accelerating import examine, put
from ssmprune_cli.adapt.adapter import Adapter
from ssmprune_cli.adapt.batches import Batch, answer_of, caller, distance
from ssmprune_cli.adapt.mixers import has_scan
from ssmprune_cli.adapt.request import Compressed, Request
from ssmprune_cli.adapt.stream import positions_of
from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning import IMPORTANCES, TokenPruner, calibrate

REDUCTIONS = ("drop",)


def shorten(adapter: Adapter, request: Request, batches: Sequence[Batch]) -> Compressed:
    """Put a pruner into `adapter`, whose recognised mixers have been swapped anew by the caller.

    Raises UsageError for a method that needs to know more of the blocks than is recognised.
    """
    request.check_reduction(REDUCTIONS, "an Adapter")
    adapter.pruner = None
    mixers = examine(adapter.model) if any(map(has_scan, adapter.model.modules())) else []
    put(adapter.model, mixers)
    adapter.install()
    known = adapter.swapped
    blind = next((name for name, each in zip(adapter.names, known, strict=True) if each is None), None)
    needs = IMPORTANCES.get(request.importance).needs
    if blind is not None and (needs != "tokens" or request.alignment not in ("none", "auto")):
        reasons = [each.line for each in mixers if each.verdict.form is None and each.name.startswith(blind)]
        raise UsageError(
            "; ".join(["has no recognised mixer, so nothing tells its score or its steps", *reasons]),
            where=blind,
            hint='Use `importance="hidden-norm"` and `alignment="none"`, which need none.',
        )
    run = caller(adapter)
    with torch.inference_mode():
        run(batches[0])  # tells the length
    stages = adapter.stages
    settings = request.settings(stages) if blind is None else request.unaligned().settings(stages)
    found = calibrate(adapter, settings, batches)
    pruner = TokenPruner(settings, stages, adapter.mixers, found.deltas)
    places = positions_of(adapter.protect, adapter.length, "protect")
    total = 0.0
    with torch.inference_mode():
        for batch in batches:
            adapter.pruner = None
            dense = answer_of(run(batch))
            adapter.pruner = pruner
            total += float(distance(dense, answer_of(run(batch)), places, adapter.length).sum())
    kinds = [each.form.kind for each in known if each is not None]
    return Compressed(
        {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        settings.schedule.tokens_per_block(stages),
        places,
        None,
        {"shorter": total / sum(map(len, batches))},
        found,
    )
