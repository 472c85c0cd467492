"""`ssmprune visualize`: pictures of the patches that a pruned model keeps after each prune point, of scores, and of
answers that are pictures themselves."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssmprune_cli.data import ImageDataset, batches, in_colour, visible_box
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import of_images
from ssmprune_cli.tasks import TASKS, Drawing
from ssmprune_cli.workflows.reporting import Stage, pixels, stages

TILE = 192  # about the side of one image in the overview, pixels; rounded to whole cells
LEAST = 384  # smaller images are enlarged to this, by a whole factor
MARGIN = 6
CAPTION = 16
GREY = (128, 128, 128)  # dropped patches, and what the model's crop leaves out, are faded to this ...
FADE = 0.7  # ... by this much
HATCH = ((242, 242, 242), (34, 34, 34))  # lines over dropped patches: one of them stands out on snow, sky and night
HATCH_PERIOD = 6  # lines' widths from one pair of lines to the next
HEAT = ((28, 16, 68), (120, 28, 109), (207, 68, 70), (251, 155, 6), (252, 255, 164))  # lowest to highest score
HEAT_STRENGTH = 0.6
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """What was written: the overview, and for each image and stage the overlay and the heat map of the score; and for
    each image what its task draws of the answers, which then is the overview.

    stages  of the first images: others may be of another size, with more patches or fewer
    words   one line for each image, about its answers; none if they are not drawn
    """

    stages: list[Stage]
    overview: Path
    images: list[dict[str, Any]]
    words: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "overview": str(self.overview),
            "stages": [stage.to_dict() for stage in self.stages],
            "images": self.images,
        }


def check_shown(model: Backbone) -> None:
    """UsageError for a model whose inputs are no pictures."""
    if not TASKS.get(model.task).shows:
        raise UsageError(f"a {model.family} takes text, of which there is no picture to draw")


def visualize(model: Backbone, dataset: ImageDataset, out: Path) -> Drawn:
    """Draw all images of `dataset` into the folder `out`.

    overview.png has a row for each image: as the model sees it and with the patches that stay, or with the answers of
    the dense and the pruned model and where they differ, if the task draws them; these are files NN_NAME_TITLE.png too.
    NN_NAME_after_B_kept.png and ..._score.png show one image, whole and in its own aspect ratio; what the model's crop
    leaves out is grey.
    Raises UsageError if the model drops no tokens or `check_shown` does, and DataError if a picture cannot be written.
    """
    check_shown(model)
    task, way = TASKS.get(model.task), of_images(model.preprocessing)
    if task.clips:
        raise UsageError(
            f"a {model.family} takes clips, and no pictures of their tokens are drawn",
            hint="`ssmprune compress --calib` shows frames of some clips in its report.",
        )
    sights: list[NDArray[np.uint8]] = []  # as the model sees the images
    told: list[int | None] = []
    kept: list[list[Stage]] = []  # by batch
    places: list[tuple[list[Stage], int]] = []  # by image: the stages of its batch, and its place in that
    drawings: list[tuple[Image.Image, Drawing]] = []
    names: list[str] = []
    for batch in batches(dataset, way, task.at_once(32)):
        found, outputs = stages(model, batch.images)
        dense = _dense(model, batch.images) if task.draws else None
        sights += list(pixels(batch.images, way))
        told += task.told(outputs)
        kept.append(found)
        places += [(found, place) for place in range(len(batch.names))]
        names += batch.names
        if dense is not None:
            for place, frame in enumerate(batch.frames):
                original = in_colour(dataset.image(len(drawings)), way)
                answers = (task.one(each, place) for each in (dense, outputs))
                drawings.append((original, task.drawn(original, (frame, frame), *answers)))
    overview = out / "overview.png"
    if drawings:
        _write(overview, side_by_side(drawings))
    else:
        _write(overview, picture(np.stack(sights), _joined(kept), [f"predicted class {each}" for each in told]))
    described: list[dict[str, Any]] = []
    for index, (name, (found, place)) in enumerate(zip(names, places, strict=True)):
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", Path(name).with_suffix("").as_posix()).strip("_")
        start, original = out / f"{index + 1:02d}_{plain}", in_colour(dataset.image(index), way)
        entry = {"name": name, "stages": _stages(found, place, original, model, start)}
        if drawings:
            drawing = drawings[index][1]
            files = {title: start.with_name(f"{start.name}_{title}.png") for title in drawing.pictures}
            for title, each in drawing.pictures.items():
                _write(files[title], each)
            entry |= {"answers": drawing.words, **{title: str(path) for title, path in files.items()}}
        described.append(entry)
    words = [f"{name}: {drawing.words}" for name, (_, drawing) in zip(names, drawings, strict=False)]
    return Drawn(kept[0], overview, described, words)


def _dense(model: Backbone, images: Tensor) -> Any:
    """What the model answers if it drops nothing."""
    pruner = model.pruner
    model.pruner = None
    try:
        with torch.inference_mode():
            return TASKS.get(model.task).answer(model, images)
    finally:
        model.pruner = pruner


def _stages(
    found: Sequence[Stage], place: int, original: Image.Image, model: Backbone, name: Path
) -> list[dict[str, Any]]:
    """Write the stages of the image at `place` of its batch, in files that start with `name`, and say where."""
    box = visible_box(original.size, of_images(model.preprocessing))
    factor = max(1, math.ceil(LEAST / max(original.size)))
    large = np.asarray(original.resize((original.width * factor, original.height * factor), Image.Resampling.NEAREST))
    whole: Box = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
    entries: list[dict[str, Any]] = []
    for stage in found:
        files = {kind: name.with_name(f"{name.name}_after_{stage.block:02d}_{kind}.png") for kind in ("kept", "score")}
        gone, score = ~stage.kept[place], stage.score[place]
        _write(files["kept"], Image.fromarray(hatched(shade(large, *faded(gone), whole), gone, whole)))
        _write(files["score"], Image.fromarray(hatched(shade(large, *heat(score), whole), np.isnan(score), whole)))
        entries.append({"after_block": stage.block, **{kind: str(path) for kind, path in files.items()}})
    return entries


def _joined(found: Sequence[Sequence[Stage]]) -> list[Stage]:
    """The stages of batches of one size as stages of all images."""
    return [
        Stage(
            same[0].block, np.concatenate([each.kept for each in same]), np.concatenate([each.score for each in same])
        )
        for same in zip(*found, strict=True)
    ]


def side_by_side(answers: Sequence[tuple[Image.Image, Drawing]]) -> Image.Image:
    """A row for each image, TILE pixels high: the image, what its drawing shows, and its words below."""
    rows = [[image, *drawing.pictures.values()] for image, drawing in answers]
    width = max(max(1, round(TILE * row[0].width / row[0].height)) for row in rows)
    titles = ["image", *answers[0][1].pictures]
    step = TILE + CAPTION + MARGIN
    canvas = Image.new("RGB", (MARGIN + len(titles) * (width + MARGIN), CAPTION + MARGIN + len(rows) * step), "white")
    text, font = ImageDraw.Draw(canvas), ImageFont.load_default()
    for column, title in enumerate(titles):
        text.text((MARGIN + column * (width + MARGIN), 2), title, fill="black", font=font)
    for number, (row, (_, drawing)) in enumerate(zip(rows, answers, strict=True)):
        top = CAPTION + MARGIN + number * step
        for column, each in enumerate(row):
            shown = each.resize((max(1, round(TILE * each.width / each.height)), TILE), Image.Resampling.BOX)
            canvas.paste(shown, (MARGIN + column * (width + MARGIN), top))
        text.text((MARGIN, top + TILE + 1), drawing.words, fill="black", font=font)
    return canvas


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
        top = CAPTION + MARGIN + row * (height + CAPTION + MARGIN)
        for column in range(len(titles)):
            shown = whole
            if column > 0:
                gone = ~found[column - 1].kept[row]
                shown = hatched(shade(whole, *faded(gone)), gone)
            canvas.paste(Image.fromarray(shown), (MARGIN + column * (width + MARGIN), top))
        text.text((MARGIN, top + height + 1), labels[row], fill="black", font=font)
    return canvas


def faded(cells: NDArray[np.bool_]) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Colours (rows, columns, 3) and their strengths (rows, columns) that fade `cells` (rows, columns) to grey."""
    return np.broadcast_to(np.array(GREY, float), (*cells.shape, 3)), FADE * cells


def heat(score: NDArray[np.float32]) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """Colours and strengths, as of `faded`, of a `score` (rows, columns): dark is low, bright is high, NaN is gone."""
    colours, strength = faded(np.isnan(score))
    if np.isnan(score).all():
        return colours, strength
    low, high = float(np.nanmin(score)), float(np.nanmax(score))
    share = (score - low) / (high - low) if high > low else np.where(np.isnan(score), np.nan, 0.5)
    steps = np.linspace(0, 1, len(HEAT))
    hot = np.stack([np.interp(np.nan_to_num(share), steps, channel) for channel in zip(*HEAT, strict=True)], axis=-1)
    there = ~np.isnan(score)
    return np.where(there[..., None], hot, colours), np.where(there, np.float64(HEAT_STRENGTH), strength)


def shade(
    image: NDArray[np.uint8],
    colours: NDArray[np.floating[Any]],
    strength: NDArray[np.floating[Any]],
    box: Box | None = None,
) -> NDArray[np.uint8]:
    """`image` (H, W, 3) blended with the `colours` (rows, columns, 3) of its cells, as strong as `strength` says.

    The cells share out `box` (left, top, right, bottom; the whole image without one). What lies outside turns grey.
    """
    left, top, right, bottom = box or (0, 0, image.shape[1], image.shape[0])
    y, inside_y = _cells(image.shape[0], top, bottom, strength.shape[0])
    x, inside_x = _cells(image.shape[1], left, right, strength.shape[1])
    inside = (inside_y[:, None] & inside_x)[..., None]  # (H, W, 1)
    alpha = np.where(inside, strength[y][:, x][..., None], FADE)
    colour = np.where(inside, colours[y][:, x], np.array(GREY, float))
    blended: NDArray[np.uint8] = np.rint((1 - alpha) * image + alpha * colour).astype(np.uint8)
    return blended


def hatched(image: NDArray[np.uint8], cells: NDArray[np.bool_], box: Box | None = None) -> NDArray[np.uint8]:
    """`image` (H, W, 3) with diagonal lines, a light and a dark one in turn, over those `cells` (rows, columns) of
    `box` that are true."""
    height, width = image.shape[:2]
    left, top, right, bottom = box or (0, 0, width, height)
    y, inside_y = _cells(height, top, bottom, cells.shape[0])
    x, inside_x = _cells(width, left, right, cells.shape[1])
    there = inside_y[:, None] & inside_x & cells[y][:, x]
    line = max(1, round(min(height, width) / TILE))  # as wide in a large image, when it is looked at as a whole
    place = (np.arange(height)[:, None] + np.arange(width)) // line % HATCH_PERIOD
    result = image.copy()
    for index, colour in enumerate(HATCH):
        result[there & (place == index)] = colour
    return result


def _cells(size: int, start: float, stop: float, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Of each of `size` pixels: which of `count` cells between `start` and `stop` has its centre, and if one has."""
    cell = np.floor((np.arange(size) + 0.5 - start) / (stop - start) * count).astype(np.int64)
    return cell.clip(0, count - 1), (cell >= 0) & (cell < count)


def _write(path: Path, image: Image.Image) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format="png")
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DataError(f"cannot be written: {error.strerror or error}", where=str(path)) from error
