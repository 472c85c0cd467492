"""A pruner for the same weights at another size: the same share of tokens stays at each point."""

from __future__ import annotations

from dataclasses import replace

from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.correction import Correction
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.pruning.schedule import PruneSchedule, share


def at_size(pruner: TokenPruner, model: Prunable, other: Prunable) -> TokenPruner:
    """The pruner of `model` for `other`, which has its weights and another grid. What was calibrated is kept: steps are
    of layers and channels, not of places."""
    settings, schedule = pruner.settings, pruner.settings.schedule
    stages = list(zip(model.stages, other.stages, strict=True))
    tokens = []
    for point, count in zip(schedule.points, schedule.tokens, strict=True):
        before, now = next(pair for pair in stages if pair[0].start < point <= pair[0].stop)
        tokens.append(share(count, before.num_patches, now.num_patches))
    found = PruneSchedule.resolve(
        other.stages,
        points=schedule.points,
        tokens=tokens,
        rectangular=REDUCTIONS.get(settings.reduction).rectangular,
    )
    like = next(other.parameters())
    sized = TokenPruner(replace(settings, schedule=found, repair="none"), other.stages, other.mixers)
    own = dict(pruner.named_buffers())
    for name, _ in list(sized.named_buffers()):
        sized.register_buffer(name, own[name].detach().clone())
    correction: Correction = pruner.correction
    sized.correct(correction)
    return sized.to(like.device, like.dtype)
