"""How much of its size a merged or pooled token should count for in the scans: the alignment `mass`.

A token that stands for n tokens takes a step 1 + mass (n - 1) times its own. One mass serves all blocks: chosen for
each block on 96 images, it was no better on others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.divergence import Outputs, divergence
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.pruning.repair import Runner, model_runner

Distance = Callable[[Any, Any], Tensor]

MASSES = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_mass(
    model: Prunable,
    pruner: TokenPruner,
    batches: Sequence[Tensor],
    dense: Tensor | None = None,
    runner: Runner | None = None,
    distance: Distance = divergence,
) -> float:
    """Give `pruner` the mass at which `model` with it is nearest to the dense model on `batches` of images.

    dense     the logits (images, classes) to be near to; None for those of `model` without a pruner
    runner    runs the model with a pruner; by default the model itself, op by op
    distance  (B,) of what the runner computes of B images

    Nearest is the least mean distance, of logits the divergence of the class probabilities; of equals, the smallest
    mass. Raises UsageError for logits of another shape.
    """
    run = runner or model_runner(model)
    answer, candidates = run(None), []
    for mass in MASSES:
        candidate = copy.deepcopy(pruner)
        candidate.set_mass(mass)
        candidates.append(run(candidate))
    # Batch by batch, for the logits of pixels are too many to keep.
    nats: list[list[Tensor]] = [[] for _ in MASSES]
    first = 0
    for batch in batches:
        wanted: Outputs = answer(batch) if dense is None else dense[first : first + len(batch)].to(batch.device)
        first += len(batch)
        for each, pruned in zip(nats, candidates, strict=True):
            own: Outputs = pruned(batch)
            if isinstance(own, Tensor) and isinstance(wanted, Tensor) and own.shape != wanted.shape:
                raise UsageError(f"the dense logits are {tuple(wanted.shape)}, and the model's {tuple(own.shape)}")
            each.append(distance(wanted, own))
    best = min((float(torch.cat(each).mean()), mass) for each, mass in zip(nats, MASSES, strict=True))[1]
    pruner.set_mass(best)
    return best
