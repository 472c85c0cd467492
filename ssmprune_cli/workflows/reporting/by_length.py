"""What was measured against the number of tokens, as a picture: time and memory with their fitted growth, and work."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssmprune_cli.workflows.reporting.plot import Panel, Series, stacked
from ssmprune_cli.workflows.scaling import Point, Scaling, Slope

_STEPS = 32  # of a curve: a straight line against a logarithm is bent


def length_plot(found: Scaling) -> str:
    """An SVG of three plots, all axes logarithmic: on them a power is a straight line."""
    threads = f"{found.threads} thread{'s' * (found.threads != 1)}"
    batch = f"a batch of {found.batch_size}, {found.dtype}, {found.device}, {threads}"
    one = "window" if found.unit == "tokens" else "image"
    time, memory, work = [], [], []
    for name, points in found.points.items():
        slope = found.slopes[name]
        times = [(float(point.tokens), point.median_ms) for point in points]
        grows = f"{name}: tokens^{slope.exponent:.2f}"
        time.append(Series(grows, times, [each.quartiles_ms for each in points], curve=_power(points, slope)))
        sizes = [(float(point.tokens), point.peak_memory_bytes / 2**20) for point in points]
        per_token = f"{name}: {slope.bytes_per_token / 1024:.2f} KiB a token"
        memory.append(Series(per_token, sizes, curve=_line(points, slope)))
        work.append(Series(name, [(float(point.tokens), point.multiply_adds / 1e9) for point in points]))
    panels = [
        Panel(time, f"Time of {batch}", "tokens", "ms, with quartiles", log_x=True, log_y=True),
        Panel(memory, f"Peak memory of {batch}", "tokens", "MiB", log_x=True, log_y=True),
        Panel(work, f"Multiply-adds of one {one}", "tokens", "G", log_x=True, log_y=True),
    ]
    return stacked(panels, title=f"Time, peak memory and multiply-adds by tokens: {', '.join(found.points)}")


def _power(points: Sequence[Point], slope: Slope) -> list[tuple[float, float]]:
    """The fitted time: a line of least squares goes through the means, here of the logarithms."""
    tokens = [math.log(point.tokens) for point in points]
    level = _mean([math.log(point.median_ms) for point in points]) - slope.exponent * _mean(tokens)
    return [(float(each.tokens), math.exp(level + slope.exponent * math.log(each.tokens))) for each in points]


def _line(points: Sequence[Point], slope: Slope) -> list[tuple[float, float]]:
    """The fitted memory, in MiB."""
    tokens = [float(point.tokens) for point in points]
    level = _mean([float(point.peak_memory_bytes) for point in points]) - slope.bytes_per_token * _mean(tokens)
    low, high = min(tokens), max(tokens)
    places = [low * (high / low) ** (step / _STEPS) for step in range(_STEPS + 1)]
    return [(place, (level + slope.bytes_per_token * place) / 2**20) for place in places]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
