"""The table "before and after": whatever was measured of both models, in words."""

from __future__ import annotations

from dataclasses import dataclass

from ssmprune_cli.report import Interval, ModelSpeed, Report
from ssmprune_cli.statistics import wilson_interval


@dataclass(frozen=True)
class Row:
    """One line of the table. `within` is the interval of the change; `key` marks what belongs in a headline."""

    title: str
    dense: str
    pruned: str
    change: str
    within: str = ""
    key: bool = False

    @property
    def whole_change(self) -> str:
        return f"{self.change} ({self.within})" if self.within else self.change


def rows(report: Report) -> list[Row]:
    """Before and after, whatever was measured of it."""
    return [*_accuracy_rows(report), *_cost_rows(report), *_speed_rows(report)]


def _accuracy_rows(report: Report) -> list[Row]:
    found = []
    accuracy = report.accuracy
    if accuracy is not None:
        low, high = accuracy.difference_interval
        found.append(
            Row(
                f"top-1 on {accuracy.count:,} images (95 % interval)",
                _share(accuracy.dense.top1, accuracy.dense.interval),
                _share(accuracy.top1, accuracy.interval),
                f"{100 * accuracy.difference:+.2f} points",
                f"{100 * low:+.2f} to {100 * high:+.2f}",
                key=True,
            )
        )
        if accuracy.top5 is not None and accuracy.dense.top5 is not None:
            before, after = (
                _share(top5, wilson_interval(round(top5 * accuracy.count), accuracy.count))
                for top5 in (accuracy.dense.top5, accuracy.top5)
            )
            change = f"{100 * (accuracy.top5 - accuracy.dense.top5):+.2f} points"
            found.append(Row("top-5 (95 % interval)", before, after, change))
    trained = report.finetuning.epochs[-1:] if report.finetuning is not None else ()
    found += [
        Row("top-1 on the validation images, fine-tuned", "-", f"{100 * epoch.top1:.2f} %", "", key=True)
        for epoch in trained
        if epoch.top1 is not None
    ]
    return found


def _cost_rows(report: Report) -> list[Row]:
    dense, pruned = report.dense, report.pruned
    if pruned is None:
        return []
    return [
        _cost("multiply-adds, all directions", dense.multiply_adds_all_directions, pruned.multiply_adds_all_directions),
        _cost("multiply-adds, one direction", dense.multiply_adds_one_direction, pruned.multiply_adds_one_direction),
    ]


def _cost(what: str, before: int, after: int) -> Row:
    return Row(what, giga(before), giga(after), _change(after / before), key=True)


def _speed_rows(report: Report) -> list[Row]:
    speed = report.speed
    if speed is None:
        return []
    dense, pruned, size = speed.dense, speed.pruned, speed.batch_size
    low, high = speed.latency_ratio_quartiles
    before, after = dense.peak_memory_bytes / 2**20, pruned.peak_memory_bytes / 2**20
    return [
        Row(
            f"latency of a batch of {size} (quartiles)",
            _latency(dense),
            _latency(pruned),
            _change(speed.latency_ratio),
            _changes(low, high),
            key=True,
        ),
        Row(
            "images per second (quartiles)",
            _throughput(dense, size),
            _throughput(pruned, size),
            _change(1 / speed.latency_ratio),
            _changes(1 / high, 1 / low),
            key=True,
        ),
        Row("peak memory", f"{before:.1f} MiB", f"{after:.1f} MiB", _change(after / before), key=True),
        Row(
            "least time for its arithmetic and bytes",
            f"{dense.floor_ms:.1f} ms",
            f"{pruned.floor_ms:.1f} ms",
            _change(pruned.floor_ms / dense.floor_ms),
        ),
    ]


def _share(share: float, interval: Interval) -> str:
    return f"{100 * share:.2f} % ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


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
