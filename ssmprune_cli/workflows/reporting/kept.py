"""Which patches of an image a pruned model keeps, and how it scores them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.grids import Grid
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted, at_least_tokens
from ssmprune_cli.models import Backbone, DenseModel
from ssmprune_cli.preprocessing import KeepRatio, Preprocessing
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class Stage:
    """What is left after one prune point, as patches of the raster grid. A token of several patches is at its middle.

    kept   (images, rows, columns) bool
    score  (images, rows, columns) float, the score that decided; NaN for patches that were gone before
    """

    block: int  # pruned after this many blocks
    kept: NDArray[np.bool_] = field(repr=False)
    score: NDArray[np.float32] = field(repr=False)

    @property
    def patches(self) -> int:
        return int(self.kept[0].size)

    @property
    def count(self) -> int:
        """Patches kept, the same number in every image."""
        return int(self.kept[0].sum())

    def to_dict(self) -> dict[str, Any]:
        return {"after_block": self.block, "kept": self.count, "patches": self.patches}


class _Recorder(Pruner):
    """Hands on to `inner` and remembers which tokens were left after each block."""

    def __init__(self, inner: Pruner) -> None:
        self.inner = inner
        self.left: list[Tensor] = []  # for each block (B, dense length) bool
        self.scores: list[Tensor] = []  # for each block (B, dense length), NaN where there is none
        self.dropped: list[bool] = []  # for each block, whether some went after it
        self.grids: list[Grid | None] = []  # for each block, that of its dense positions, if tokens know theirs

    def wants(self, block: int) -> Wanted:
        return at_least_tokens(self.inner.wants(block))

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def __call__(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        given = sequence
        sequence = self.inner(block, sequence, statistics)
        self.grids.append(given.grid if given.merged is None else given.merged.grid)
        self.left.append(_dense(sequence, _live(sequence), False))
        scores = torch.full(given.positions.shape, math.nan, device=given.positions.device)
        self.dropped.append(not torch.equal(self.left[-1], _dense(given, _live(given), False)))
        if self.dropped[-1] and isinstance(self.inner, TokenPruner) and self.inner.goes_by_score:
            scores = self.inner.score(block, given, statistics).float().where(_live(given), math.nan)
        self.scores.append(_dense(given, scores, math.nan))
        return sequence


def _live(sequence: TokenSequence) -> Tensor:
    """(B, L) bool"""
    return torch.ones_like(sequence.positions, dtype=torch.bool) if sequence.live is None else sequence.live


def _dense(sequence: TokenSequence, values: Tensor, rest: float) -> Tensor:
    """`values` (B, L) of the tokens at their dense positions (B, dense length), `rest` elsewhere."""
    dense = torch.full((len(values), sequence.dense_length), rest, dtype=values.dtype, device=values.device)
    return dense.scatter(1, sequence.dense_positions(), values)


def stages(model: Backbone, images: Tensor) -> tuple[list[Stage], Any]:
    """Run `model` on normalised `images` (B, *input_shape): what is left after each prune point, and the outputs.

    Raises UsageError if the model drops no tokens.
    """
    inner = model.pruner
    if inner is None:
        hint = "Give the folder that `ssmprune compress` wrote."
        if model.config.resized_from is not None or model.config.cut_from is not None:
            option = "--cut-blocks" if model.config.resized_from is None else "--resize"
            hint = f"It was made smaller alone: give `ssmprune compress` a `--keep` below 1 beside `{option}`."
        raise UsageError("this model drops no tokens", hint=hint)
    recorder = _Recorder(inner)
    slot: Backbone = model.encoder if isinstance(model, DenseModel) else model
    del slot.pruner  # a module's attribute that holds a module takes nothing else, so it goes first
    slot.pruner = recorder
    try:
        with torch.inference_mode():
            outputs = TASKS.get(model.task).answer(model, images)
    finally:
        del slot.pruner
        slot.pruner = inner
    found: list[Stage] = []
    for stage in model.stages:  # each begins with all of its tokens
        for block in range(stage.start, stage.stop):
            left = recorder.left[block]
            if recorder.dropped[block]:
                shape = recorder.grids[block] or stage.grid  # images may be of another size than the model's own
                patches = [position for position in range(left.shape[1]) if position not in stage.protected]
                kept, score = (
                    dense[:, patches].reshape(len(images), *shape).cpu().numpy()  # (B, rows, columns)
                    for dense in (left, recorder.scores[block])
                )
                found.append(Stage(block + 1, kept, score))
    if not found:
        raise UsageError("this model drops no tokens", hint="Compress it with a `--keep` below 1.")
    return found, outputs


def pixels(images: Tensor, preprocessing: Preprocessing | KeepRatio) -> NDArray[np.uint8]:
    """Normalised `images` (B, 3, H, W) as pixels (B, H, W, 3), red first; of clips (B, 3, T, H, W) all frames, one
    below the other."""
    if images.ndim == 5:
        images = images.flatten(2, 3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    scaled = ((images.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    if preprocessing.channels == "bgr":
        scaled = scaled.flip(1)
    result: NDArray[np.uint8] = scaled.permute(0, 2, 3, 1).numpy()
    return result
