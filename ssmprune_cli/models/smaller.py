"""Smaller models of the same weights, before any token is dropped: for smaller images, with fewer blocks, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ssmprune_cli.models.common import FAMILIES, Backbone
from ssmprune_cli.models.cutting import before_cutting, blocks_cut, cut_short
from ssmprune_cli.models.resizing import before_resizing, resize


@dataclass(frozen=True)
class Size:
    """What is left of a dense model.

    side  of its images, in pixels; None is its own
    cut   how many of the last blocks of its longest stage are left out
    """

    side: int | None = None
    cut: int = 0

    def __str__(self) -> str:
        blocks = f"{self.cut} block" if self.cut == 1 else f"{self.cut} blocks"
        parts = ("" if self.side is None else f"{self.side} pixels", f"cut short by {blocks}" if self.cut else "")
        return ", ".join(filter(None, parts))


WHOLE = Size()


def smaller(model: Backbone, size: Size) -> Backbone:
    """A new model of the weights of the dense `model`; `model` itself for WHOLE. Raises as `resize` and `cut_short`."""
    if size.side is not None:
        model = resize(model, size.side)
    return cut_short(model, size.cut) if size.cut else model


def size_of(model: Backbone) -> Size:
    """By how much `model` is smaller than the dense one."""
    return Size(None if model.config.resized_from is None else model.image_size[0], blocks_cut(model.config))


def dense_config(config: Any) -> Any:
    """The configuration of the dense model that one of `config` was made of; `config` itself if it is that model's.
    TypeError or UsageError where what it says of that model cannot be."""
    return before_resizing(before_cutting(config))


def blocks_left_out(model: Backbone) -> tuple[int, ...]:
    """Numbers, from 0, of the blocks of the dense model that `model` lacks."""
    count = blocks_cut(model.config)
    if not count:
        return ()
    with torch.device("meta"):
        dense = FAMILIES.get(model.family).build(before_cutting(model.config))
    longest = max(dense.stages, key=lambda stage: stage.stop - stage.start)
    return tuple(range(longest.stop - count, longest.stop))
