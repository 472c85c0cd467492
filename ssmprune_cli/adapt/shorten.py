"""`compress` for an Adapter: blocks run on the tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmprune_cli.adapt.accelerating import examine, put
from ssmprune_cli.adapt.adapter import Adapter
from ssmprune_cli.adapt.batches import Batch, answer_of, caller, distance
from ssmprune_cli.adapt.mixers import dense, has_scan
from ssmprune_cli.adapt.request import Compressed, Request
from ssmprune_cli.adapt.stream import positions_of
from ssmprune_cli.adapt.swap import Swapped
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
    check_places(adapter, batches[0])
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


class _Inputs:
    """The place of mixers whose inputs are noted down. See `swap.Place`."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        self.seen.append(x)
        return dense(swapped.__self__, swapped.form, x)

    def refuse(self, name: str, reason: str) -> None:
        """Nothing is dropped yet."""


@torch.inference_mode()
def check_places(adapter: Adapter, batch: Batch) -> None:
    """UsageError for a block whose mixer does not see a token at the place that it has in the block, as in a flipped
    sequence: the scores and the gaps of its scan would be those of other tokens."""
    tokens = batch.first().given_to(adapter.embedded)
    for name, block, mixer in zip(adapter.names, adapter.blocks, adapter.swapped, strict=True):
        after = adapter.block(block, tokens)
        if mixer is not None:
            mixer.place = inputs = _Inputs()
            other, place = tokens.clone(), tokens.shape[1] // 5
            other[:, place] = tokens[:, place].roll(1, dims=-1) + 1
            for each in (tokens, other):
                adapter.block(block, each)
            mixer.place = None
            first, *rest = inputs.seen or [tokens]
            if len(rest) == 1 and first.shape == tokens.shape and torch.equal(first[:, place], rest[0][:, place]):
                raise UsageError(
                    "its mixer has the tokens at other places than the block",
                    where=name,
                    hint="`ssmprune_cli.accelerate` makes a mixer over a flipped or permuted sequence faster as it is.",
                )
        tokens = after
