"""Time of forward passes, of several models in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Progress = Callable[[int, int], None]  # (rounds done, rounds in all)


@dataclass(frozen=True)
class Speed:
    """Of one batch: milliseconds at the median, at the quartiles and in each round; images per second at the median."""

    median_ms: float
    quartiles_ms: tuple[float, float]
    images_per_second: float
    rounds: int
    rounds_ms: tuple[float, ...]


def interleaved_speeds(
    models: Sequence[nn.Module],
    images: Tensor | Sequence[Tensor],
    rounds: int,
    progress: Progress | None = None,
    warm_up: int = 2,
) -> list[Speed]:
    """Of a forward pass of each model on `images` (B, 3, H, W), or on its own of several: `rounds` turns each, after
    `warm_up` that are left out."""
    given = [images] * len(models) if isinstance(images, Tensor) else images
    seconds: list[list[float]] = [[] for _ in models]
    with torch.inference_mode():
        for round_number in range(-warm_up, rounds):
            for model, batch, times in zip(models, given, seconds, strict=True):
                start = time.perf_counter()
                model(batch)
                if batch.is_cuda:
                    torch.cuda.synchronize(batch.device)
                if round_number >= 0:
                    times.append(time.perf_counter() - start)
            if progress is not None and round_number >= 0:
                progress(round_number + 1, rounds)
    return [_speed(times, len(batch)) for batch, times in zip(given, seconds, strict=True)]


def _speed(times: list[float], batch_size: int) -> Speed:
    median = statistics.median(times)
    low, high = quartiles(times)
    return Speed(
        1e3 * median, (1e3 * low, 1e3 * high), batch_size / median, len(times), tuple(1e3 * each for each in times)
    )


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (values[0],) * 3
    return low, high
