"""The same weights for smaller images: fewer tokens from the first block on, and no training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models.common import FAMILIES, MAX_SIDE, Backbone
from ssmprune_cli.models.dense import DenseConfig, DenseModel


@torch.inference_mode(False)  # as of a checkpoint: weights made in inference mode have no version
def resize(model: Backbone, side: int) -> Backbone:
    """A new model of the weights of `model` for square images of `side` pixels, on its device and in its dtype; for a
    dense model, which is given whole images, `side` is the short one.

    Position embeddings are interpolated (bicubic), as `load(..., image_size=side)` does. Of an image the new model sees
    the same part as `model`, scaled to its own side: see `preprocessing`. At the side of `model` it is a copy of it.

    Raises UsageError for a side that patches do not fill exactly, with possible ones nearby, and for a model that drops
    tokens, is in eight bits, was resized before, takes images that are not square, or is no backbone of ours.
    """
    if not isinstance(model, Backbone):
        raise UsageError(
            f"a {type(model).__name__} has no position embeddings that are known: `resize` takes a backbone",
            hint='Load the checkpoint with `ssmprune_cli.load("FILE.pth")`, and give what it returns.',
        )
    if model.pruner is not None:
        raise UsageError(
            "the image size of a model that drops tokens is fixed, because its token counts are",
            hint="Resize the dense model, and compress the result: `compress(resize(model, side), keep=...)`.",
        )
    if model.eight_bit_kinds:
        raise UsageError(
            f"the weights of {', '.join(model.eight_bit_kinds)} are in eight bits",
            hint="Resize the model in float, and compress the result.",
        )
    family, config = FAMILIES.get(model.family), model.config
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    if _side(model) != side:
        _check(model, side)
        # In float32 at least, as a checkpoint is read.
        exact = {
            name: value.cpu().to(torch.promote_types(value.dtype, torch.float32))
            for name, value in state.items()
            if value.is_floating_point()
        }
        found, config = family.resize(exact, config, side)
        like = next(model.parameters())
        changed = {name: value for name, value in found.items() if value is not exact[name]}
        state |= {name: value.to(like.device, state[name].dtype) for name, value in changed.items()}
        if isinstance(config, DenseConfig):
            config = replace(config, resized=model.config.preprocessing)
        else:
            config = replace(config, resized_from=model.image_size)
    with torch.device("meta"):
        resized = family.build(config)
    for name, parameter in resized.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    resized.load_state_dict(state, strict=True, assign=True)
    return resized.train(model.training)


def sides(model: Backbone) -> tuple[int, ...]:
    """Sides of smaller images that `resize` can make of `model`: the largest first, at least half of its own.

    None for a model that cannot be resized: a classifier whose images are not square, or one that was resized before.
    """
    own = _side(model)
    if own is None or model.config.resized_from is not None:
        return ()
    fills = FAMILIES.get(model.family).fills
    return tuple(side for side in range(own - 1, -(-own // 2) - 1, -1) if fills(model.config, side))


def before_resizing(config: Any) -> Any:
    """The configuration of the dense model that one of `config` was made of; `config` itself if it is that model's."""
    if config.resized_from is None:
        return config
    if isinstance(config, DenseConfig):
        assert config.resized is not None
        return replace(config.with_images(config.resized), resized=None)
    return replace(config, image_size=config.resized_from, resized_from=None)


def _side(model: Backbone) -> int | None:
    """By what a model is resized: the side of square images, or the short side of a dense model's; None for others."""
    if isinstance(model, DenseModel):
        return model.preprocessing.short
    height, width = model.image_size
    return height if height == width else None


def _check(model: Backbone, side: int) -> None:
    height, width = model.image_size
    if _side(model) is None:
        raise UsageError(f"images of {height} x {width} pixels are not square, and only square ones are resized")
    first = model.config.resized_from
    if first is not None:
        raise UsageError(
            f"the model was resized before, from {first[0]} to {height} pixels",
            hint="Resize the model that it was made of: every interpolation loses something.",
        )
    fills = FAMILIES.get(model.family).fills
    if not fills(model.config, side):
        ways = (range(min(side, MAX_SIDE) - 1, 0, -1), range(max(side, 0) + 1, MAX_SIDE))
        below, above = (next((each for each in way if fills(model.config, each)), None) for way in ways)
        nearby = " or ".join(str(each) for each in (below, above) if each is not None)
        raise UsageError(f"patches do not fill images of {side} pixels", hint=f"Possible sides nearby: {nearby}.")
