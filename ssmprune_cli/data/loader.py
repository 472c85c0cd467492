"""Batches of preprocessed images or windows of text, read ahead in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ssmprune_cli.data.datasets import ImageDataset, Target
from ssmprune_cli.data.image_file import one_image
from ssmprune_cli.errors import DataError
from ssmprune_cli.preprocessing import ClipPreprocessing, Frame, Preparation

_AHEAD = 2  # batches read while the model works on one


@dataclass(frozen=True)
class Batch:
    """`images` (B, 3, H, W) float32, of clips (B, 3, T, H, W) or with several views (B, views, 3, T, H, W), of text the
    numbers of tokens (B, L) int64; and of each its target, its frame and a name."""

    images: Tensor = field(repr=False)
    targets: tuple[Target, ...] = field(repr=False)
    frames: tuple[Frame, ...]
    names: tuple[str, ...]


class _Loaded(NamedTuple):
    image: Tensor  # (3, H, W), or see Batch
    target: Target
    frame: Frame
    name: str


def batches(dataset: ImageDataset, way: Preparation, batch_size: int) -> Iterator[Batch]:
    """The images of `dataset` in order, `batch_size` at a time, or fewer: a batch ends where the size of the prepared
    image changes, and the last one ends with the dataset.

    Raises DataError naming the image that cannot be read, when its batch is due; before, for clips that are to be
    prepared as images, and the other way round.
    """
    if dataset.clips != isinstance(way, ClipPreprocessing):
        given, taken = ("clips", "images") if dataset.clips else ("images", "clips")
        raise DataError(f"these are {given}, and the model takes {taken}", where=dataset.name(0))

    def load(index: int) -> _Loaded:
        with one_image():
            prepared, frame = dataset.prepared(index, way)
            return _Loaded(prepared, dataset.target(index), frame, dataset.name(index))

    waiting: deque[Future[_Loaded]] = deque()
    indices = iter(range(len(dataset)))
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="ssmprune-images")
    try:
        while True:
            while len(waiting) < (1 + _AHEAD) * batch_size and (index := next(indices, None)) is not None:
                waiting.append(pool.submit(load, index))
            if not waiting:
                return
            same = [waiting.popleft().result()]
            while waiting and len(same) < batch_size and waiting[0].result().image.shape == same[0].image.shape:
                same.append(waiting.popleft().result())
            yield Batch(
                torch.stack([each.image for each in same]),
                tuple(each.target for each in same),
                tuple(each.frame for each in same),
                tuple(each.name for each in same),
            )
    finally:
        pool.shutdown(cancel_futures=True)
