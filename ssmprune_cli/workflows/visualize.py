"""`ssmprune visualize`: a picture of the patches that a pruned model keeps after each prune point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssmprune_cli.data import batches
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.tokens import TokenSequence

TILE = 192  # about the side of one image in the picture, pixels; rounded to whole cells
MARGIN = 6
CAPTION = 16
DROPPED = (60, 100, 180)  # a dropped patch is faded to this blue, which stands out in grey images and photographs ...
FADE = 0.7  # ... by this much


@dataclass(frozen=True)
class Stage:
    """What is left after one prune point: `kept` (images, rows, columns) bool, patches of the raster grid."""

    block: int  # pruned after this many blocks
    kept: NDArray[np.bool_]

    @property
    def patches(self) -> int:
        return int(self.kept[0].size)

    @property
    def count(self) -> int:
        """Patches kept, the same number in every image."""
        return int(self.kept[0].sum())

    def to_dict(self) -> dict[str, Any]:
        return {"after_block": self.block, "kept": self.count, "patches": self.patches}


class Recorder:
    """Implements `tokens.Pruner`: hands on to `inner` and remembers which tokens were left after each block."""

    def __init__(self, inner: Pruner) -> None:
        self.inner = inner
        self.left: list[Tensor] = []  # for each block (B, dense length) bool

    def wants_delta(self, block: int) -> bool:
        return self.inner.wants_delta(block)

    def alignment(self, block: int) -> ScanAlignment | None:
        return self.inner.alignment(block)

    def __call__(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        sequence = self.inner(block, sequence, statistics)
        live = torch.ones_like(sequence.positions, dtype=torch.bool) if sequence.live is None else sequence.live
        left = torch.zeros(len(live), sequence.length, dtype=torch.bool, device=live.device)
        self.left.append(left.scatter(1, sequence.positions, live))
        return sequence


def visualize(model: Backbone, dataset: ImageDataset, out: Path) -> list[Stage]:
    """Write a PNG of all images of `dataset`, and what `model` keeps of them, to `out`. Returns what it kept.

    Raises UsageError if the model drops no tokens, and DataError if the picture cannot be written.
    """
    images = torch.cat([batch.images for batch in batches(dataset, model.preprocessing, batch_size=32)])
    found, logits = stages(model, images)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.preprocessing.mean, model.preprocessing.std))
    pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    image = picture(pixels, found, [f"predicted class {int(best)}" for best in logits.argmax(dim=1)])
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="png")
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot be written: {error.strerror}", where=str(out)) from error
    return found


def stages(model: Backbone, images: Tensor) -> tuple[list[Stage], Tensor]:
    """Run `model` on normalised `images` (B, 3, H, W): what is left after each prune point, and the logits.

    Raises UsageError if the model drops no tokens.
    """
    inner = model.pruner
    if inner is None:
        raise UsageError("this model drops no tokens", hint="Give the folder that `ssmprune compress` wrote.")
    recorder = Recorder(inner)
    del model.pruner  # a module's attribute that holds a module takes nothing else, so it goes first
    model.pruner = recorder
    try:
        with torch.inference_mode():
            logits: Tensor = model(images)
    finally:
        del model.pruner
        model.pruner = inner
    found: list[Stage] = []
    for grid in model.stages:  # each begins with all of its tokens
        patches = [position for position in range(grid.num_tokens) if position not in grid.protected]
        before = grid.num_tokens
        for block, left in enumerate(recorder.left[grid.start : grid.stop], start=grid.start + 1):
            count = int(left[0].sum())
            if count != before:
                found.append(Stage(block, left[:, patches].reshape(len(images), *grid.grid).cpu().numpy()))
            before = count
    if not found:
        raise UsageError("this model drops no tokens", hint="Compress it with a `--keep` below 1.")
    return found, logits


def picture(pixels: NDArray[np.uint8], found: Sequence[Stage], labels: Sequence[str]) -> Image.Image:
    """A row for each image of `pixels` (B, H, W, 3): the image, then what each stage kept, dropped patches faded.

    `labels` (B) is written under the images, such as what the model sees.
    """
    rows, columns = max((stage.kept.shape[1:] for stage in found), key=math.prod)  # of the finest grid
    cell = max(1, round(TILE / max(rows, columns)))
    width, height = columns * cell, rows * cell
    canvas = Image.new(
        "RGB",
        (MARGIN + (len(found) + 1) * (width + MARGIN), CAPTION + MARGIN + len(pixels) * (height + CAPTION + MARGIN)),
        "white",
    )
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    titles = ["image"] + [f"after block {s.block}: {s.count} of {s.patches} patches" for s in found]
    for column, title in enumerate(titles):
        text.text((MARGIN + column * (width + MARGIN), 2), title, fill="black", font=font)
    for row, image in enumerate(pixels):
        whole = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST))
        top = tile_top(row, height)
        for column in range(len(titles)):
            shown = whole if column == 0 else fade(whole, ~found[column - 1].kept[row])
            canvas.paste(Image.fromarray(shown), (MARGIN + column * (width + MARGIN), top))
        text.text((MARGIN, top + height + 1), labels[row], fill="black", font=font)
    return canvas


def tile_top(row: int, height: int) -> int:
    """The y coordinate of the images of `row`, which are `height` pixels high."""
    return CAPTION + MARGIN + row * (height + CAPTION + MARGIN)


def fade(image: NDArray[np.uint8], cells: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """`image` (H, W, 3) with those of its `cells` (rows, columns), which share it out evenly, faded to blue."""
    y, x = (np.arange(size) * count // size for size, count in zip(image.shape[:2], cells.shape, strict=True))
    mask = cells[y][:, x][..., None]
    faded = np.rint((1 - FADE) * image + FADE * np.array(DROPPED)).astype(np.uint8)
    return np.where(mask, faded, image)
