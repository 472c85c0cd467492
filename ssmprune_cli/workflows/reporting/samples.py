"""Sample images of a report: as the model sees them, with the patches that stay after each prune point."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.errors import shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.report import Sample, SampleStage
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.reporting.kept import pixels, stages


def samples(
    pruned: Backbone, dense: Backbone, dataset: ImageDataset, count: int, device: torch.device
) -> tuple[tuple[Sample, ...], dict[str, bytes]]:
    """`count` images from all over `dataset`, and the PNG files of an artefact that they name. Each model gets them
    prepared its own way; the files are what `pruned` sees."""
    count = min(count, len(dataset))
    if count == 0:
        return (), {}
    chosen = Subset(dataset, spread(len(dataset), count))
    (batch,) = batches(chosen, pruned.preprocessing, count)
    (own,) = batches(chosen, dense.preprocessing, count)
    images = batch.images.to(device)
    with torch.inference_mode():
        reference = dense(own.images.to(device))
        found, logits = ([], pruned(images)) if pruned.pruner is None else stages(pruned, images)
    files: dict[str, bytes] = {}
    described = []
    for index, picture in enumerate(pixels(images, pruned.preprocessing)):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="png")
        file = f"sample_{index + 1}.png"
        files[file] = buffer.getvalue()
        described.append(
            Sample(
                name=shown(batch.names[index]),
                file=file,
                label=None if batch.labels is None else int(batch.labels[index]),
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
