"""How much of its size a merged or pooled token should count for in the scans: the alignment `mass`.

A token that stands for n tokens takes a step 1 + mass (n - 1) times its own. One mass serves all blocks: chosen for
each block on 96 images, it was no better on others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.divergence import divergence
from ssmprune_cli.pruning.pruner import TokenPruner

MASSES = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_mass(model: Prunable, pruner: TokenPruner, batches: Sequence[Tensor], dense: Tensor | None = None) -> float:
    """Give `pruner` the mass at which `model` with it is nearest to the dense model on `batches` of images.

    dense  the logits (images, classes) to be near to; None for those of `model` without a pruner

    Nearest is the least mean divergence of the class probabilities; of equals, the smallest mass.
    """
    installed = model.pruner

    def logits() -> Tensor:
        return torch.cat([model.forward(batch).float() for batch in batches])

    try:
        with torch.inference_mode():
            model.pruner = None
            wanted = logits()
            if dense is not None:
                if dense.shape != wanted.shape:
                    raise UsageError(
                        f"the dense logits are {tuple(dense.shape)}, and the model's {tuple(wanted.shape)}"
                    )
                wanted = dense.to(wanted)
            model.pruner = pruner
            found = []
            for mass in MASSES:
                pruner.set_mass(mass)
                found.append((float(divergence(wanted, logits()).mean()), mass))
    finally:
        model.pruner = installed
    best = min(found)[1]
    pruner.set_mass(best)
    return best
