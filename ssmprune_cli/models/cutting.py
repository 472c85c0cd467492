"""The same weights without the last blocks: what dropping tokens is compared with."""

from __future__ import annotations

import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import FAMILIES, Backbone


@torch.inference_mode(False)  # as of a checkpoint: weights made in inference mode have no version
def cut_short(model: Backbone, blocks: int) -> Backbone:
    """A new model of the weights of `model` without the last `blocks` blocks of its longest stage, on its device and in
    its dtype. What follows them was not trained for what it then sees: `repair(cut, images, dense=logits)` refits the
    head.

    Raises UsageError for a model that drops tokens, and for another number of blocks than `cuts` names.
    """
    if model.pruner is not None:
        raise UsageError("a model that drops tokens cannot be cut short", hint="Cut the dense model.")
    if blocks not in cuts(model):
        raise UsageError(f"of this {model.family} {len(cuts(model))} blocks at most can be cut, and not {blocks}")
    with torch.device("meta"):
        shorter = FAMILIES.get(model.family).build(model.config.without_blocks(blocks))
    state = model.state_dict()
    kept = {name: state[name].detach().clone() for name in shorter.state_dict()}
    for name, parameter in shorter.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    shorter.load_state_dict(kept, strict=True, assign=True)
    return shorter.train(model.training)


def cuts(model: Backbone) -> range:
    """How many blocks `cut_short` can take from `model`: one of its longest stage stays. None if its outputs are of
    several depths."""
    if model.config.without_blocks(0) is None:
        return range(0)
    return range(1, max(stage.stop - stage.start for stage in model.stages))
