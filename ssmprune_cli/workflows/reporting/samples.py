"""Sample images of a report: as the model sees them, with the patches that stay after each prune point."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.errors import shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.report import Sample, SampleStage
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.reporting.kept import pixels, stages

POOL = 32  # images that are looked through for changed answers, where no evaluation has done so


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
        changed = _changed(pruned, dense, dataset, device)
    first = [changed[place] for place in spread(len(changed), min(len(changed), count // 2))]
    rest = sorted(set(range(len(dataset))).difference(first))
    order = [*first, *(rest[place] for place in spread(len(rest), count - len(first)))]
    chosen = Subset(dataset, order)
    (batch,) = batches(chosen, pruned.preprocessing, count)
    (own,) = batches(chosen, dense.preprocessing, count)
    images = batch.images.to(device)
    with torch.inference_mode():
        reference = dense(own.images.to(device))
        found, logits = ([], pruned(images)) if pruned.pruner is None else stages(pruned, images)
    files: dict[str, bytes] = {}
    described = []
    for index, picture in enumerate(pixels(images, pruned.preprocessing)):
        target, buffer = batch.targets[index], io.BytesIO()
        Image.fromarray(picture).save(buffer, format="png")
        file = f"sample_{index + 1}.png"
        files[file] = buffer.getvalue()
        described.append(
            Sample(
                name=shown(batch.names[index]),
                file=file,
                label=target if isinstance(target, int) else None,
                chosen="changed" if index < len(first) else "random",
                predicted_dense=int(reference[index].argmax()),
                predicted_pruned=int(logits[index].argmax()),
                stages=tuple(
                    SampleStage(
                        after_block=stage.block,
                        grid=(stage.kept.shape[1], stage.kept.shape[2]),
                        kept=tuple(np.flatnonzero(stage.kept[index]).tolist()),
                    )
                    for stage in found
                ),
            )
        )
    return tuple(described), files


def _changed(pruned: Backbone, dense: Backbone, dataset: ImageDataset, device: torch.device) -> list[int]:
    """Indices of images, of POOL from all over `dataset`, that the two models answer differently."""
    pool = spread(len(dataset), min(POOL, len(dataset)))
    chosen, found = Subset(dataset, pool), []
    with torch.inference_mode():
        for model in (pruned, dense):
            parts = batches(chosen, model.preprocessing, batch_size=16)
            found.append(torch.cat([model(batch.images.to(device)).argmax(dim=1) for batch in parts]))
    return [index for index, differs in zip(pool, (found[0] != found[1]).tolist(), strict=True) if differs]
