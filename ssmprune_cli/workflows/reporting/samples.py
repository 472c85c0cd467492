"""Sample images of a report: as the model sees them, with the patches that stay after each prune point."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ssmprune_cli.data import ImageDataset, Subset, batches, in_colour
from ssmprune_cli.errors import shown
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import of_images
from ssmprune_cli.report import Sample, SampleStage
from ssmprune_cli.tasks import TASKS, Drawing
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.reporting.kept import pixels, stages

SIDE = 384  # pixels of a picture, at most
POOL = 32  # images, or fewer large ones, that are looked through for changed answers if no evaluation has done so


def samples(
    pruned: Backbone,
    dense: Backbone,
    dataset: ImageDataset,
    count: int,
    device: torch.device,
    changed: Sequence[int] | None = None,
) -> tuple[tuple[Sample, ...], dict[str, bytes]]:
    """`count` images of `dataset`, and the PNG files of an artefact that they name.

    Up to half of them are images whose answer has changed, and come first: some of `changed`, or without an evaluation
    of those in a small part of the dataset. The rest are random ones from all over it. Each model gets them prepared
    its own way; the files are what `pruned` sees.
    """
    count = min(count, len(dataset))
    if count == 0:
        return (), {}
    if changed is None:
        changed = _changed(pruned, dense, dataset, device, max(count, TASKS.get(pruned.task).at_once(POOL)))
    first = [changed[place] for place in spread(len(changed), min(len(changed), count // 2))]
    rest = sorted(set(range(len(dataset))).difference(first))
    order = [*first, *(rest[place] for place in spread(len(rest), count - len(first)))]
    task, described, way = TASKS.get(pruned.task), [], of_images(pruned.preprocessing)
    files: dict[str, bytes] = {}
    for number, index in enumerate(order, start=1):
        chosen = Subset(dataset, [index])
        (batch,), (own,) = (batches(chosen, model.preprocessing, 1) for model in (pruned, dense))
        images, target = batch.images.to(device), batch.targets[0]
        with torch.inference_mode():
            reference = task.answer(dense, own.images.to(device))
            found, outputs = ([], task.answer(pruned, images)) if pruned.pruner is None else stages(pruned, images)
        picture = Image.fromarray(pixels(images, way)[0])
        file = f"sample_{number}.png"
        parts = {file: _small(picture, frames=pruned.stages[0].frames)}
        drawing = Drawing({}, "")
        if task.draws:
            original = _small(in_colour(dataset.image(index), way))
            drawing = task.drawn(original, (own.frames[0], batch.frames[0]), reference, outputs)
        titles = {title: f"sample_{number}_{title}.png" for title in drawing.pictures}
        parts |= {titles[title]: each for title, each in drawing.pictures.items()}
        files |= {name: _png(each) for name, each in parts.items()}
        described.append(
            Sample(
                name=shown(batch.names[0]),
                file=file,
                label=target if isinstance(target, int) else None,
                chosen="changed" if number <= len(first) else "random",
                predicted_dense=task.told(reference)[0],
                predicted_pruned=task.told(outputs)[0],
                words=drawing.words,
                pictures=titles,
                size=(picture.height, picture.width),
                stages=tuple(
                    SampleStage(
                        after_block=stage.block,
                        grid=(stage.kept.shape[1], stage.kept.shape[2]),
                        kept=tuple(np.flatnonzero(stage.kept[0]).tolist()),
                    )
                    for stage in found
                ),
            )
        )
    return tuple(described), files


def _small(image: Image.Image, frames: int = 1) -> Image.Image:
    """At most SIDE pixels a side, so that a page with all of them stays small; of several frames half of that each."""
    image = image.copy()
    image.thumbnail((SIDE, SIDE) if frames == 1 else (SIDE // 2, SIDE // 2 * frames))
    return image


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def _changed(pruned: Backbone, dense: Backbone, dataset: ImageDataset, device: torch.device, many: int) -> list[int]:
    """Indices of images, of so many from all over `dataset`, that the two models answer differently."""
    pool = spread(len(dataset), min(many, len(dataset)))
    chosen, task, found = Subset(dataset, pool), TASKS.get(pruned.task), []
    with torch.inference_mode():
        for model in (pruned, dense):
            session, parts = prepare(model, device=device), batches(chosen, model.preprocessing, task.at_once(16))
            found.append(torch.cat([task.sample(session(batch.images)) for batch in parts]))
    differs = task.differ(found[1], found[0])
    return [index for index, each in zip(pool, differs.tolist(), strict=True) if each]
