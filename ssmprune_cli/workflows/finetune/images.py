"""Training images by epoch and step: read and augmented ahead in threads, each process its own share."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.preprocessing import Preprocessing
from ssmprune_cli.recipe_sections import Training
from ssmprune_cli.workflows.finetune.augment import mix, soft_targets, training_image
from ssmprune_cli.workflows.processes import Share

_AHEAD = 2  # parts of a batch read while the model works on one


def steps_per_epoch(dataset: ImageDataset, settings: Training) -> int:
    """Updates in an epoch: what does not fill a batch is left for another epoch. UsageError if there is none."""
    if len(dataset) < settings.batch_size:
        raise UsageError(
            f"{len(dataset)} training images do not fill a batch of {settings.batch_size}", hint="Lower `--batch-size`."
        )
    return len(dataset) // settings.batch_size


def order(count: int, settings: Training, seed: int, epoch: int) -> Tensor:
    """Indices of the images of an epoch (steps, batch). Repetitions of an image are in one batch, never neighbours."""
    steps, fresh = count // settings.batch_size, -(-settings.batch_size // settings.repeats)
    generator = torch.Generator().manual_seed(mixed_seed(seed, epoch))
    index = torch.randperm(count, generator=generator)[: steps * fresh].view(steps, fresh)
    return index.repeat(1, settings.repeats)[:, : settings.batch_size]


def mixed_seed(*parts: int) -> int:
    """One seed, below 2**63, from several numbers."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def epoch_parts(
    dataset: ImageDataset,
    model: Backbone,
    settings: Training,
    *,
    seed: int,
    epoch: int,
    first_step: int,
    share: Share,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images, targets) of every part of every step from `first_step` of `epoch`, for one process.

    images (b, 3, H, W) normalised, targets (b, classes), b = batch_size / accumulate / processes. What an image looks
    like does not depend on how many processes or parts there are. Raises DataError for an unreadable image.
    """
    part = part_size(settings, share)
    plan = order(len(dataset), settings, seed, epoch)[first_step:]
    starts = [
        (first_step + step, (piece * share.processes + share.rank) * part)
        for step in range(len(plan))
        for piece in range(settings.accumulate)
    ]
    preprocessing: Preprocessing = model.preprocessing

    def load(step: int, place: int) -> Tensor:
        index = int(plan[step - first_step, place])
        try:
            return training_image(
                dataset.image(index), preprocessing, settings, mixed_seed(seed, epoch, step, place, 0)
            )
        except ValueError as error:
            raise DataError(f"cannot be prepared for the model: {error}", where=dataset.name(index)) from error

    waiting: deque[tuple[int, int, list[Future[Tensor]]]] = deque()
    upcoming = iter(starts)
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="ssmprune-images")
    try:
        while True:
            while len(waiting) <= _AHEAD and (following := next(upcoming, None)) is not None:
                step, start = following
                waiting.append((step, start, [pool.submit(load, step, start + i) for i in range(part)]))
            if not waiting:
                return
            step, start, futures = waiting.popleft()
            images = torch.stack([future.result() for future in futures])
            indices = plan[step - first_step, start : start + part].tolist()
            labels = torch.tensor([dataset.label(index) for index in indices])
            targets = soft_targets(labels, model.num_classes, settings.label_smoothing)
            if settings.mixup or settings.cutmix:
                seeds = [mixed_seed(seed, epoch, step, start + i, 1) for i in range(0, part, 2)]
                images, targets = mix(images, targets, settings, seeds)
            yield images, targets
    finally:
        pool.shutdown(cancel_futures=True)


def part_size(settings: Training, share: Share) -> int:
    """Images that go through the model at once in one process. Raises UsageError if the batch cannot be divided so."""
    parts = settings.accumulate * share.processes
    if settings.batch_size % parts:
        raise UsageError(
            f"a batch of {settings.batch_size} images cannot be shared by {share.processes} processes in "
            f"{settings.accumulate} parts",
            hint="Choose a `--batch-size` that is a multiple of processes times accumulated parts.",
        )
    size = settings.batch_size // parts
    if size % 2 and (settings.mixup or settings.cutmix):
        raise UsageError(f"mixup and cutmix mix pairs of images, and {size} images at once are no pairs")
    return size
