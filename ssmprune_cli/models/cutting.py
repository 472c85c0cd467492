"""The same weights without the last blocks: a smaller model of the same family, and no training."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import FAMILIES, Backbone

MAX_CUT = 1024  # blocks that a configuration may lack


@torch.inference_mode(False)  # as of a checkpoint: weights made in inference mode have no version
def cut_short(model: Backbone, blocks: int) -> Backbone:
    """A new model of the weights of `model` without the last `blocks` blocks of its longest stage, on its device and in
    its dtype. What follows them was not trained for what it then sees: `repair(cut, images, dense=logits)` refits the
    head.

    Raises UsageError for a model that drops tokens or is in eight bits, and for another number of blocks than
    `cuts` names.
    """
    if model.pruner is not None:
        raise UsageError("a model that drops tokens cannot be cut short", hint="Cut the dense model.")
    if model.eight_bit_kinds:
        raise UsageError(
            f"the weights of {', '.join(model.eight_bit_kinds)} are in eight bits",
            hint="Cut the model in float, and compress the result.",
        )
    if model.config.cut_from is not None:
        raise UsageError("the model was cut short before", hint="Cut the model that it was made of.")
    if blocks not in cuts(model):
        raise UsageError(f"of this {model.family} {len(cuts(model))} blocks at most can be cut, and not {blocks}")
    with torch.device("meta"):
        shorter = FAMILIES.get(model.family).build(_without(model.config, blocks))
    state = model.state_dict()
    kept = {name: state[name].detach().clone() for name in shorter.state_dict()}
    for name, parameter in shorter.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    shorter.load_state_dict(kept, strict=True, assign=True)
    return shorter.train(model.training)


def cuts(model: Backbone) -> range:
    """How many blocks `cut_short` can take from `model`: one of its longest stage stays. None if its outputs are of
    several depths, or if it was cut before."""
    if model.config.cut_from is not None or model.config.without_blocks(0) is None:
        return range(0)
    return range(1, max(stage.stop - stage.start for stage in model.stages))


def blocks_cut(config: Any) -> int:
    """How many blocks of the dense model one of `config` lacks. UsageError if it is not that model without its last
    ones."""
    if config.cut_from is None:
        return 0
    dense = before_cutting(config)
    for blocks in range(1, MAX_CUT):
        try:
            if _without(dense, blocks) == config:
                return blocks
        except UsageError:  # there are no more
            break
    raise UsageError("cut_from is of no model whose last blocks are left out here")


def _without(config: Any, blocks: int) -> Any:
    shorter = config.without_blocks(blocks)
    if shorter is None:
        raise UsageError("outputs of several depths need all blocks")
    names = [field.name for field in fields(config)]
    both = [(name, getattr(config, name), getattr(shorter, name)) for name in names]
    return replace(shorter, cut_from=tuple((name, before) for name, before, after in both if before != after))


def before_cutting(config: Any) -> Any:
    """The configuration of the model that one of `config` was cut from; `config` itself if that was not cut. TypeError
    or UsageError where what it says of that model cannot be."""
    return config if config.cut_from is None else replace(config, **dict(config.cut_from), cut_from=None)
