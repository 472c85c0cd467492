"""Files of mmsegmentation and mmdetection: where encoder and heads lie in them, and how images are prepared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models.common import MAX_SIDE, Family, Hints
from ssmprune_cli.models.dense.model import DenseConfig
from ssmprune_cli.preprocessing import KeepRatio

C = TypeVar("C", bound=DenseConfig)
V = TypeVar("V")


def part(values: Mapping[str, V], *prefixes: str) -> dict[str, V]:
    """What names that begin with one of `prefixes` stand for, without it."""
    found = {}
    for name, value in values.items():
        prefix = next((each for each in prefixes if name.startswith(each)), None)
        if prefix is not None:
            found[name.removeprefix(prefix)] = value
    return found


def encoder_part(values: Mapping[str, V]) -> dict[str, V]:
    """What of the names in a file is of an encoder, as its own family names it in a file."""
    own = part(values, "encoder.")
    return own or {name: value for name, value in values.items() if name.startswith("backbone.")}


def renamed(
    state: Mapping[str, Tensor], encoder: Family, heads: Mapping[str, str], dropped: Sequence[str]
) -> dict[str, Tensor]:
    """A file's weights in the names of a DenseModel; those that are there already stay.

    heads    what names begin with in the file, to what they begin with in the model
    dropped  what names of weights begin with that have no part in the answers

    Raises CheckpointError for a weight that is there under both names.
    """
    inside, found = dict[str, Tensor](), dict[str, Tensor]()
    for name, value in state.items():
        if name.startswith((*dropped, "ema_")):  # mmcv's moving average: the weights proper already hold it
            continue
        if name.startswith("backbone."):
            inside[name] = value
            continue
        stored = next((each for each in heads if name.startswith(each)), "")
        own = heads.get(stored, "") + name.removeprefix(stored)
        if own in found:
            raise CheckpointError(f"has the weight {own} twice, also as {name}")
        found[own] = value
    return found | {f"encoder.{name}": value for name, value in encoder.remap(inside).items()}


def whole_images(hints: Hints, published: KeepRatio | None, usual: KeepRatio) -> KeepRatio:
    """How images are brought to a model: as the file says, else as `published`; scaled to the side that is asked for,
    for which `usual` is enough. CheckpointError where nothing of it says."""
    known = hints.keep_ratio or published
    if hints.asked_size is not None:
        known = scaled(known or usual, hints.asked_size)
    if known is None:
        raise CheckpointError(
            "neither the weights nor the file say to what size images are resized for this model",
            hint=f"Give the short side that it was trained with: `--image-size {usual.short}`, for example.",
        )
    stated = {"mean": hints.mean, "std": hints.std, "channels": hints.channels}
    return replace(known, **{name: value for name, value in stated.items() if value is not None})  # type: ignore[arg-type]


def scaled(images: KeepRatio, short: int) -> KeepRatio:
    """The same for another short side, the long one in proportion."""
    return replace(images, short=short, long=(2 * images.long * short + images.short) // (2 * images.short))


def resize(state: dict[str, Tensor], config: C, side: int) -> tuple[dict[str, Tensor], C]:
    """For images whose short side is another: the weights stay, as positions are resized image by image."""
    if not 4 <= side <= MAX_SIDE:
        raise UsageError(f"images of {side} pixels are not possible", hint=f"From 4 to {MAX_SIDE} are.")
    return state, config.with_images(scaled(config.preprocessing, side))
