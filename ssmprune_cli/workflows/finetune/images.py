"""Training images by epoch and step: every process prepares its own share, itself or in worker processes."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ssmprune_cli.data import ImageDataset, unprepared
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import of_images
from ssmprune_cli.recipe import Training
from ssmprune_cli.workflows.finetune.lessons import LESSONS, Lesson, Pupil
from ssmprune_cli.workflows.processes import Share

_MOST_WORKERS = 8
_FOR_THE_TRAINING = (signal.SIGINT, signal.SIGTERM)  # sent to the whole group; it stops after the update at hand

_Part = tuple[Tensor, Tensor] | DataError


def default_workers(device: torch.device, processes: int) -> int:
    """Worker processes for one of `processes`: none beside a model that needs the cores itself."""
    return 0 if device.type == "cpu" else min(_MOST_WORKERS, (os.cpu_count() or 1) // processes)


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


@dataclass(frozen=True)
class _Parts(Dataset[_Part]):
    """Parts of updates by (step, place of the first image). An error is a value: a loader would reword it."""

    images: ImageDataset
    lesson: Lesson
    pupil: Pupil
    settings: Training
    order: Tensor  # (steps, batch)
    size: int
    seeds: tuple[int, int]  # of the training, and the epoch

    def __getitem__(self, at: tuple[int, int]) -> _Part:
        step, start = at
        places = range(start, start + self.size)
        try:
            examples = [self._example(step, place) for place in places]
        except DataError as error:
            return error
        images, targets = (torch.stack(each) for each in zip(*examples, strict=True))
        seeds = [mixed_seed(*self.seeds, step, place, 1) for place in places[::2]]
        return self.lesson.together(images, targets, self.settings, seeds)

    def _example(self, step: int, place: int) -> tuple[Tensor, Tensor]:
        index = int(self.order[step, place])
        image, name = self.images.image(index), self.images.name(index)
        seed = mixed_seed(*self.seeds, step, place, 0)
        try:
            return self.lesson.example(image, self.images.target(index), name, self.pupil, self.settings, seed)
        except (ValueError, OSError, MemoryError) as error:
            raise unprepared(error, name) from error


@contextmanager
def epoch_parts(
    dataset: ImageDataset,
    model: Backbone,
    settings: Training,
    *,
    seed: int,
    epoch: int,
    first_step: int,
    share: Share,
    workers: int = 0,
) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """(images, targets) of every part of every step from `first_step` of `epoch`, for one process. Workers end with it.

    images (b, 3, H, W) normalised, targets (b, ...) of the lesson, b = batch_size / accumulate / processes. What an
    image looks like does not depend on how many processes, workers or parts there are. Raises DataError for an
    unreadable image and SsmpruneError when a worker has died.
    """
    size = part_size(settings, share)
    plan = order(len(dataset), settings, seed, epoch)
    starts = [
        (step, (piece * share.processes + share.rank) * size)
        for step in range(first_step, len(plan))
        for piece in range(settings.accumulate)
    ]
    pupil = Pupil(of_images(model.preprocessing), model.image_size, model.num_classes)
    parts = _Parts(dataset, LESSONS.get(model.task), pupil, settings, plan, size, (seed, epoch))
    loader = DataLoader(
        parts,
        batch_size=None,
        sampler=starts,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # its own: the training's draws must not depend on when a loader starts
    )
    others = set(active_children())
    started = _start(loader)
    own = set(active_children()) - others
    try:
        yield _images(started)
    except (RuntimeError, OSError, EOFError) as error:  # any of them, wherever the training is, when a worker dies
        if not _end(own, patience=1.0):
            raise
        raise SsmpruneError(
            f"a process that prepares images has died: {error}",
            hint="Memory may have run out: lower `--workers` (0 needs no such process) or `--batch-size`.",
        ) from error
    finally:
        _end(own)


def _images(parts: Iterator[_Part]) -> Iterator[tuple[Tensor, Tensor]]:
    for part in parts:
        if isinstance(part, DataError):
            raise part
        yield part


def _start(loader: DataLoader[_Part]) -> Iterator[_Part]:
    """A loader at work. Its workers inherit that signals wait, so that none is hit before it can ignore them."""
    if sys.platform == "win32":  # no signal is sent to a group there
        return iter(loader)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_THE_TRAINING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(workers: set[BaseProcess], patience: float = 0.0) -> bool:
    """Whether a worker has died by itself, or does within so many seconds: its connections break before. The others are
    ended. The loader would do it once nothing refers to it, but the traceback of an error does, and at its end Python
    waits for them, forever, as they ignore the signal that it sends."""
    if not workers:
        return False
    if sys.platform != "win32":
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises when a worker dies
    ended = wait([worker.sentinel for worker in workers], timeout=patience)
    for worker in workers:
        if worker.sentinel not in ended:
            worker.kill()
        worker.join()
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, handler)
    return any(worker.exitcode for worker in workers if worker.sentinel in ended)


def _ignore_signals(worker: int) -> None:
    for number in _FOR_THE_TRAINING:
        signal.signal(number, signal.SIG_IGN)


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
