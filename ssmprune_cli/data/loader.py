"""Batches of preprocessed images, read ahead in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.data.image_file import one_image
from ssmprune_cli.data.preprocess import preprocess
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import Preprocessing

_AHEAD = 2  # batches read while the model works on one


@dataclass(frozen=True)
class Batch:
    """`images` (B, 3, crop, crop) float32, `labels` (B,) int64 or None if the dataset has none, and a name for each."""

    images: Tensor = field(repr=False)
    labels: Tensor | None = field(repr=False)
    names: tuple[str, ...]


def batches(dataset: ImageDataset, preprocessing: Preprocessing, batch_size: int) -> Iterator[Batch]:
    """The images of `dataset` in order, `batch_size` at a time; the last batch may be smaller.

    Raises DataError naming the image that cannot be read, when its batch is due.
    """

    def load(index: int) -> Tensor:
        with one_image():
            image = dataset.image(index)
            try:
                return preprocess(image, preprocessing)
            except (ValueError, OSError, MemoryError) as error:
                raise unprepared(error, dataset.name(index)) from error

    waiting: deque[tuple[range, list[Future[Tensor]]]] = deque()
    starts = iter(range(0, len(dataset), batch_size))
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="ssmprune-images")
    try:
        while True:
            while len(waiting) <= _AHEAD and (start := next(starts, None)) is not None:
                indices = range(start, min(start + batch_size, len(dataset)))
                waiting.append((indices, [pool.submit(load, index) for index in indices]))
            if not waiting:
                return
            indices, futures = waiting.popleft()
            yield _batch(dataset, indices, torch.stack([future.result() for future in futures]))
    finally:
        pool.shutdown(cancel_futures=True)


def unprepared(error: Exception, name: str) -> DataError:
    """What to raise for an image that was read, and cannot be made what a model expects."""
    reason = "there is not enough memory" if isinstance(error, MemoryError) else str(error)
    return DataError(f"cannot be prepared for the model: {reason}", where=name)


def _batch(dataset: ImageDataset, indices: range, images: Tensor) -> Batch:
    found = [label for index in indices if (label := dataset.label(index)) is not None]
    labels = torch.tensor(found) if len(found) == len(images) else None
    return Batch(images, labels, tuple(dataset.name(index) for index in indices))
