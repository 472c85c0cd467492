"""`ssmprune profile`: parameters, multiply-adds, tokens per block, latency, its parts and floor, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ssmprune_cli.errors import UsageError
from ssmprune_cli.export import OnnxSession
from ssmprune_cli.inference import Explanation
from ssmprune_cli.kernels import active_backend, refused_backends
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.measure import (
    Floor,
    Progress,
    Speed,
    bytes_moved,
    count_flops,
    floor,
    interleaved_speeds,
    peak_memory,
    resolve_device,
    time_by_part,
)
from ssmprune_cli.workflows.subject import definition_of, session_of


@dataclass(frozen=True)
class Figures:
    """Of one model, or of an exported file. Multiply-adds are for one image, or window of text; `flops` names the
    conventions.

    inputs               what the model takes, in words
    multiply_adds_head   of all, those of a dense model's head; 0 for a classifier
    bytes_moved       by gathers, sorts and sums of one image, which are no multiply-adds
    backend           what the kernels ran on; `backends_refused` says why not on a better one
    session           how the timed session computes each block
    prepared_in_seconds  that session, once; 0 for a file, which is read as one
    """

    family: str
    inputs: str
    image_size: tuple[int, int]
    parameters: int
    multiply_adds_all_directions: int
    multiply_adds_one_direction: int
    multiply_adds_head: int
    tokens_per_block: tuple[int, ...]
    multiply_adds_per_block: tuple[int, ...]
    bytes_moved: int
    batch_size: int
    dtype: str
    device: str
    backend: str
    backends_refused: dict[str, str]
    threads: int
    speed: Speed
    session: Explanation
    prepared_in_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Profile(Figures):
    """Of a model whose ops can be watched: an exported file's cannot.

    time_ms  where the median goes, by part (see `breakdown`)
    floor    what its arithmetic and bytes need at least on this machine
    """

    peak_memory_bytes: int
    time_ms: dict[str, float]
    floor: Floor

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "floor": self.floor.to_dict()}


def tokens_per_block(model: Backbone) -> tuple[int, ...]:
    """Length of the sequence that enters each block of `model`, protected tokens included."""
    if isinstance(model.pruner, TokenPruner) and model.pruner.shortens:
        return model.pruner.settings.schedule.tokens_per_block(model.stages)
    return tuple(stage.num_tokens for stage in model.stages for _ in range(stage.start, stage.stop))


def profile(
    models: list[Backbone],
    *,
    batch_size: int | None = None,
    device: str = "cpu",
    rounds: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Profile]:
    """`figures` of models."""
    found = figures(models, batch_size=batch_size, device=device, rounds=rounds, seed=seed, progress=progress)
    return [each for each in found if isinstance(each, Profile)]


def figures(
    models: Sequence[Backbone | OnnxSession],
    *,
    batch_size: int | None = None,
    device: str = "cpu",
    rounds: int = 10,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Figures]:
    """Profile `models` side by side: their timed runs are interleaved, so that a drift of the machine hits all alike.

    Timing is on random images: static token counts make it independent of what they show. Two warm-up rounds are left
    out. Each model gets images of its own size. Raises UsageError for a device that is not there, models of different
    dtypes, or a batch that an exported file does not take.
    """
    definitions = [definition_of(model) for model in models]
    batch_size = _batch_size(models, TASKS.get(definitions[0].task).at_once(8), batch_size)
    if batch_size < 1 or rounds < 1:
        raise UsageError("the batch size and the number of rounds must be at least 1")
    if len({model.dtype for model in models}) > 1:
        raise UsageError(f"the models' weights differ in dtype: {', '.join(str(model.dtype) for model in models)}")
    target = resolve_device(device)
    images = [model.example(batch_size, seed).to(target) for model in definitions]
    counts = [count_flops(model) for model in definitions]
    sessions, seconds = [], []
    for each in models:
        start = time.perf_counter()
        sessions.append(session_of(each, target))
        seconds.append(time.perf_counter() - start if isinstance(each, Backbone) else 0.0)
    speeds = interleaved_speeds(sessions, images, rounds, progress)
    found = []
    measured = zip(definitions, sessions, seconds, images, counts, speeds, strict=True)
    for model, session, prepared, batch, count, speed in measured:
        common: dict[str, Any] = {
            "family": model.family,
            "inputs": model.sized,
            "image_size": model.image_size,
            "parameters": model.parameter_count,
            "multiply_adds_all_directions": count.all_directions,
            "multiply_adds_one_direction": count.one_direction,
            "multiply_adds_head": count.head,
            "tokens_per_block": tokens_per_block(model),
            "multiply_adds_per_block": count.per_block,
            "bytes_moved": bytes_moved(model),
            "batch_size": batch_size,
            "dtype": session.computes_in,
            "device": str(target),
            "backend": active_backend(target, model.dtype),
            "backends_refused": refused_backends(target, model.dtype),
            "threads": torch.get_num_threads(),
            "speed": speed,
            "session": session.explain(),
            "prepared_in_seconds": prepared,
        }
        if not session.watched:
            found.append(Figures(**common))
            continue
        memory = peak_memory(session, batch)
        parts = time_by_part(session, batch, speed.median_ms)
        found.append(Profile(**common, peak_memory_bytes=memory, time_ms=parts, floor=floor(session, batch)))
    return found


def _batch_size(models: Sequence[Backbone | OnnxSession], usual: int, asked: int | None) -> int:
    """That `asked` for, or that of the files that take no other. UsageError where these do not agree."""
    fixed = {each.batch for each in models if isinstance(each, OnnxSession) and each.batch is not None}
    wanted = fixed if asked is None else fixed | {asked}
    if len(wanted) > 1:
        raise UsageError(
            f"a file takes batches of {min(fixed)} images and no others, and {max(wanted)} are asked for",
            where="--batch-size",
            hint="`ssmprune export` without `--batch` writes files for batches of any size.",
        )
    return next(iter(wanted), usual)
