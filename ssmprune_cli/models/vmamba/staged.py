"""Stages of blocks over a grid of tokens, with a downsampling between two: VMamba and what has been made of it.

Tokens are dropped within a stage. Before a downsampling, and before the classifier, the grid is made whole again: a
dropped token comes back with the value that it had when it left, so that both see what they see in the dense model,
every place of the grid. A grid whose tokens were merged into a smaller one is whole, and stays that small in later
stages. Letters: B batch, L tokens now, d model width of a stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import DataError
from ssmprune_cli.grids import divided
from ssmprune_cli.interface import Stage
from ssmprune_cli.models.common import Backbone, Block
from ssmprune_cli.models.vmamba.layers import STRIDE
from ssmprune_cli.tokens import TokenSequence


class StagedBackbone(Backbone):
    """A family makes `patch_embed`, which gives (B, rows, columns, d), and `layers`, the stages. Each has `blocks`, and
    a `downsample` or None."""

    restores = True
    patch_embed: Any
    layers: nn.ModuleList

    def stage_outputs(self, images: Tensor) -> Iterator[Tensor]:
        """Every place of the dense grid after each stage, before its downsampling: (B, rows, columns, d)."""
        for whole in self._stages(images):
            grid = whole.patch_grid if whole.merged is None else whole.merged.grid
            yield whole.spread(whole.hidden).unflatten(1, grid)

    def _stages(self, images: Tensor) -> Iterator[TokenSequence]:
        """The tokens of the whole grid after each stage, before its downsampling."""
        if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < 4:
            raise DataError(f"the model takes images (B, 3, H, W) of 4 pixels or more, not {tuple(images.shape)}")
        block, whole = 0, None
        downsample: Any = None
        x = self.embed(images)
        for layer in self.scanned_layers:
            if whole is not None:
                x = downsample(whole.hidden.unflatten(1, whole.patch_grid))
            sequence, downsample = next_stage(x, whole), layer.downsample
            for each in layer.blocks:
                alignment, wanted = self.ask_pruner(block, sequence)
                sequence, statistics = each(sequence, alignment, wanted)
                sequence = self.prune(block, sequence, statistics, wanted)
                block += 1
            whole = sequence.restored()
            yield whole

    def embed(self, images: Tensor) -> Tensor:
        """What the first stage with scans is given of images (B, 3, H, W): (B, rows, columns, d)."""
        embedded: Tensor = self.patch_embed(images)
        return embedded

    @property
    def scanned_layers(self) -> Sequence[Any]:
        """The stages whose blocks have scans: all of them, unless a family goes on without."""
        return list(self.layers)

    @property
    def blocks(self) -> list[Block]:
        return [block for layer in self.scanned_layers for block in layer.blocks]

    @property
    def stages(self) -> tuple[Stage, ...]:
        found, start, grid = [], 0, self.grid
        for layer in self.scanned_layers:
            depth = len(layer.blocks)
            found.append(Stage(start, start + depth, grid, stride=STRIDE))
            start, grid = start + depth, divided(grid, STRIDE)
        return tuple(found)


def next_stage(x: Tensor, before: TokenSequence | None) -> TokenSequence:
    """The tokens x (B, rows, columns, d) of a stage; `before` the downsampling that made them they were those."""
    readout = None if before is None else before.readout
    sequence = TokenSequence.dense(x.flatten(1, 2), grid=(x.shape[1], x.shape[2]), restorable=True, readout=readout)
    if before is None or before.merged is None:
        return sequence
    merged = before.merged.divided(before.patch_grid, STRIDE)
    # A token stands for as much as the mean of those that met in it, and all of them for the whole dense grid.
    sizes = before.sizes().unflatten(1, before.patch_grid)
    size = functional.avg_pool2d(sizes[:, None], STRIDE, ceil_mode=True, count_include_pad=False).flatten(1)
    size = size * (math.prod(merged.grid) / size.sum(dim=1, keepdim=True))
    return replace(sequence, size=size, merged=merged)
