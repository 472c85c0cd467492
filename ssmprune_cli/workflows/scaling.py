"""`ssmprune profile --lengths` and `--image-sizes`: time, memory and multiply-adds against the number of tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.models import Backbone, LanguageModel, resize
from ssmprune_cli.pruning import TokenPruner, at_size
from ssmprune_cli.workflows.measure import Progress, count_flops, interleaved_speeds, peak_memory, resolve_device

_SECONDS = 20.0  # that the rounds of one size may take, before they become fewer
_LEAST = 3


@dataclass(frozen=True)
class Point:
    """One model at one size, of a batch; multiply-adds are of one image or window, all directions.

    tokens  that enter the first block
    """

    tokens: int
    median_ms: float
    quartiles_ms: tuple[float, float]
    rounds: int
    multiply_adds: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Slope:
    """How the figures of one model grow.

    exponent          p of time ~ tokens^p, by least squares of the logarithms: 1 is linear
    bytes_per_token   of peak memory, by least squares: what one more token of every sequence of the batch takes
    """

    exponent: float
    bytes_per_token: float


@dataclass(frozen=True)
class Scaling:
    """Of several models at several sizes.

    sizes   lengths of windows in tokens, or sides of images in pixels; `unit` says which
    points  of each model (by name), one for each size
    slopes  of each model
    """

    unit: str
    sizes: tuple[int, ...]
    batch_size: int
    dtype: str
    device: str
    threads: int
    points: dict[str, tuple[Point, ...]]
    slopes: dict[str, Slope]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def scaling(
    models: dict[str, Backbone],
    sizes: Sequence[int],
    *,
    unit: str,
    batch_size: int = 1,
    device: str = "cpu",
    rounds: int = 10,
    progress: Progress | None = None,
) -> Scaling:
    """Measure `models`, by name, at `sizes` in rising order: at each they take turns, for `rounds` or as many as 20 s
    allow, and three at least.

    unit  "tokens" for lengths of text, "pixels" for sides of images: models that cannot be had at a size are refused

    Token counts of a pruned model keep their shares. Raises UsageError for a size or a model that does not fit.
    """
    if len(set(sizes)) < 2 or list(sizes) != sorted(set(sizes)):
        raise UsageError(f"takes two sizes or more in rising order, not {', '.join(map(str, sizes))}", where=unit)
    target = resolve_device(device)
    points: dict[str, list[Point]] = {name: [] for name in models}
    for number, size in enumerate(sizes):
        sized = {name: _at(model.to(target), size, unit, batch_size) for name, model in models.items()}
        sessions = [prepare(model, device=target) for model, _ in sized.values()]
        batches = [batch for _, batch in sized.values()]
        turns = _turns(sessions, batches, rounds)
        speeds = interleaved_speeds(sessions, batches, turns, warm_up=1)
        for (name, (model, batch)), session, speed in zip(sized.items(), sessions, speeds, strict=True):
            work = count_flops(model, batch[:1]).all_directions
            memory = peak_memory(session, batch)
            tokens = _entering(model, batch)
            points[name].append(Point(tokens, speed.median_ms, speed.quartiles_ms, speed.rounds, work, memory))
        del sessions
        if progress:
            progress(number + 1, len(sizes))
    dtype = str(next(iter(models.values())).dtype).removeprefix("torch.")
    return Scaling(
        unit=unit,
        sizes=tuple(sizes),
        batch_size=batch_size,
        dtype=dtype,
        device=str(target),
        threads=torch.get_num_threads(),
        points={name: tuple(each) for name, each in points.items()},
        slopes={name: _slope(each) for name, each in points.items()},
    )


def _at(model: Backbone, size: int, unit: str, batch_size: int) -> tuple[Backbone, Tensor]:
    """The model at this size, and a batch for it."""
    if unit == "tokens":
        if not isinstance(model, LanguageModel):
            raise UsageError(
                f"is for text, and a {model.family} takes images", where="--lengths", hint="Give `--image-sizes`."
            )
        return model, model.window(batch_size, size, seed=0)
    if isinstance(model, LanguageModel):
        raise UsageError(
            f"is for images, and a {model.family} takes text", where="--image-sizes", hint="Give `--lengths`."
        )
    if model.any_size:
        like = next(model.parameters())
        return model, torch.zeros(batch_size, 3, size, size, device=like.device, dtype=like.dtype)
    pruner, model.pruner = model.pruner, None
    try:
        other = resize(model, size)
    finally:
        model.pruner = pruner
    if isinstance(pruner, TokenPruner):
        other.pruner = at_size(pruner, model, other)
    return other, other.example(batch_size, seed=0)


def _entering(model: Backbone, batch: Tensor) -> int:
    """Tokens of one of `batch` that enter the first block: `num_tokens` is of the model's own size."""
    seen: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].length))
    try:
        with torch.inference_mode():
            model(batch[:1])
    finally:
        handle.remove()
    return seen[0]


def _turns(sessions: Sequence[Session], batches: Sequence[Tensor], rounds: int) -> int:
    start = time.perf_counter()
    for session, batch in zip(sessions, batches, strict=True):
        session(batch)
    once = time.perf_counter() - start
    return max(min(_LEAST, rounds), min(rounds, int(_SECONDS / once)))


def _slope(points: Sequence[Point]) -> Slope:
    tokens = np.array([point.tokens for point in points], dtype=np.float64)
    logs = np.polyfit(np.log(tokens), [math.log(point.median_ms) for point in points], 1)
    memory = np.polyfit(tokens, [float(point.peak_memory_bytes) for point in points], 1)
    return Slope(float(logs[0]), float(memory[0]))
