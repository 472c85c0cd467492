"""The table "before and after": whatever was measured of both models, in words."""

from __future__ import annotations

from ssmprune_cli.report import Figures, ModelSpeed, Report
from ssmprune_cli.tasks import TASKS, Row


def rows(report: Report) -> list[Row]:
    """Before and after, whatever was measured of it."""
    return [*_judged_rows(report), *_cost_rows(report), *_speed_rows(report)]


def _judged_rows(report: Report) -> list[Row]:
    task = TASKS.get(report.task)
    compared = task.facts(report)
    trained = report.finetuning.epochs[-1:] if report.finetuning is not None else ()
    return [
        *(() if compared is None else task.rows(compared)),
        *(
            Row(f"{task.metric} on the validation images, fine-tuned", "-", f"{100 * value:.2f} %", "")
            for epoch in trained
            if (value := getattr(epoch, task.key)) is not None
        ),
    ]


def _cost_rows(report: Report) -> list[Row]:
    dense, pruned = report.dense, report.pruned
    if pruned is None:
        return []
    return [
        _cost("multiply-adds, all directions", dense.multiply_adds_all_directions, pruned.multiply_adds_all_directions),
        _cost("multiply-adds, one direction", dense.multiply_adds_one_direction, pruned.multiply_adds_one_direction),
        *_head_rows(dense, pruned),
        Row(
            "moved by gathers, sorts and sums",
            f"{dense.bytes_moved / 1e6:.2f} MB",
            f"{pruned.bytes_moved / 1e6:.2f} MB",
            f"{(pruned.bytes_moved - dense.bytes_moved) / 1e6:+.2f} MB",
            better=_less(dense.bytes_moved, pruned.bytes_moved),
        ),
    ]


def _head_rows(dense: Figures, pruned: Figures) -> list[Row]:
    """Of a model with a head of its own, so that a saving is seen for what it is one of."""
    if not dense.multiply_adds_head:
        return []
    before, after = (each.multiply_adds_all_directions - each.multiply_adds_head for each in (dense, pruned))
    return [
        _cost("of the backbone, all directions", before, after),
        _cost("of the head", dense.multiply_adds_head, pruned.multiply_adds_head),
    ]


def _cost(what: str, before: int, after: int) -> Row:
    return Row(what, giga(before), giga(after), _change(after / before), better=_less(before, after))


def _speed_rows(report: Report) -> list[Row]:
    speed = report.speed
    if speed is None:
        return []
    dense, pruned, size = speed.dense, speed.pruned, speed.batch_size
    low, high = speed.latency_ratio_interval
    faster = True if high < 1 else False if low > 1 else None
    before, after = dense.peak_memory_bytes / 2**20, pruned.peak_memory_bytes / 2**20
    return [
        Row(
            f"latency of a batch of {size} (quartiles; of the change 95 %)",
            _latency(dense),
            _latency(pruned),
            _change(speed.latency_ratio),
            _changes(low, high),
            better=faster,
        ),
        Row(
            "images per second (quartiles; of the change 95 %)",
            _throughput(dense, size),
            _throughput(pruned, size),
            _change(1 / speed.latency_ratio),
            _changes(1 / high, 1 / low),
            better=faster,
        ),
        Row(
            "peak memory",
            f"{before:.1f} MiB",
            f"{after:.1f} MiB",
            _change(after / before),
            better=_less(round(before, 1), round(after, 1)),
        ),
        Row(
            "least time for its arithmetic and bytes",
            f"{dense.floor_ms:.1f} ms",
            f"{pruned.floor_ms:.1f} ms",
            _change(pruned.floor_ms / dense.floor_ms),
            better=_less(dense.floor_ms, pruned.floor_ms),
        ),
    ]


def _less(before: float, after: float) -> bool | None:
    """Whether what had better be small has become less."""
    return None if before == after else after < before


def giga(count: int) -> str:
    return f"{count / 1e9:.4g} G"


def _latency(speed: ModelSpeed) -> str:
    return f"{speed.median_ms:.1f} ms ({speed.quartiles_ms[0]:.1f} to {speed.quartiles_ms[1]:.1f})"


def _throughput(speed: ModelSpeed, batch_size: int) -> str:
    slow, fast = (1e3 * batch_size / each for each in reversed(speed.quartiles_ms))
    return f"{speed.images_per_second:.1f} ({slow:.1f} to {fast:.1f})"


def _change(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def _changes(low: float, high: float) -> str:
    return f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f}"
