"""The facts of a report in words, for the page and the summary alike: what both say is worded once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ssmprune_cli.report import ModelAccuracy, ModelSpeed, Report


@dataclass(frozen=True)
class Row:
    """One line of "before and after". `key` marks those that belong in a headline."""

    title: str
    dense: str
    pruned: str
    change: str
    key: bool = False


def title(name: str, report: Report) -> str:
    """What the model is, in a line."""
    name = name or str(report.provenance.get("input", report.family))
    if report.pruned is None:
        return f"{name}: all tokens kept"
    return f"{name}: {100 * saving(report):.1f} % fewer multiply-adds"


def saving(report: Report) -> float:
    """Share of the dense multiply-adds, all directions, that pruning saves."""
    if report.pruned is None:
        return 0.0
    return 1 - report.pruned.multiply_adds_all_directions / report.dense.multiply_adds_all_directions


def description(report: Report) -> str:
    height, width = report.image_size
    return f"Family {report.family}, {height}x{width} pixels, {report.parameters:,} parameters."


def method(report: Report) -> str:
    """Where tokens are dropped, and how."""
    if report.pruning is None:
        return "No tokens are dropped."
    pruning = report.pruning
    return (
        f"After {joined(pruning.points)} blocks, {joined(pruning.tokens)} patch tokens stay. Importance "
        f"{pruning.importance}, reduction {pruning.reduction}, alignment {pruning.alignment}."
    )


def joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def rows(report: Report) -> list[Row]:
    """Before and after, whatever was measured of it."""
    found: list[Row] = []
    dense, pruned, accuracy, speed = report.dense, report.pruned, report.accuracy, report.speed
    if accuracy is not None:
        low, high = accuracy.difference_interval
        found.append(
            Row(
                f"top-1 on {accuracy.count:,} images (95 % interval)",
                _accuracy(accuracy.dense),
                _accuracy(accuracy),
                f"{100 * accuracy.difference:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})",
                key=True,
            )
        )
        if accuracy.top5 is not None and accuracy.dense.top5 is not None:
            change = f"{100 * (accuracy.top5 - accuracy.dense.top5):+.2f} points"
            found.append(Row("top-5", f"{100 * accuracy.dense.top5:.2f} %", f"{100 * accuracy.top5:.2f} %", change))
    if pruned is not None:
        for what, before, after in (
            ("all directions", dense.multiply_adds_all_directions, pruned.multiply_adds_all_directions),
            ("one direction", dense.multiply_adds_one_direction, pruned.multiply_adds_one_direction),
        ):
            cells = (f"{before / 1e9:.4g} G", f"{after / 1e9:.4g} G", change_in_percent(after / before))
            found.append(Row(f"multiply-adds, {what}", *cells, key=what == "all directions"))
    if speed is not None:
        before_ms, after_ms = speed.dense, speed.pruned
        what = f"latency of a batch of {speed.batch_size}, median (quartiles)"
        found.append(
            Row(what, _latency(before_ms), _latency(after_ms), change_in_percent(speed.latency_ratio), key=True)
        )
        for what, one, other, form in (
            ("images per second", before_ms.images_per_second, after_ms.images_per_second, "{:.1f}"),
            ("peak memory", before_ms.peak_memory_bytes / 2**20, after_ms.peak_memory_bytes / 2**20, "{:.1f} MiB"),
            ("least time for its arithmetic and bytes", before_ms.floor_ms, after_ms.floor_ms, "{:.1f} ms"),
        ):
            key = what == "peak memory"
            found.append(Row(what, form.format(one), form.format(other), change_in_percent(other / one), key=key))
    return found


def _accuracy(model: ModelAccuracy) -> str:
    return f"{100 * model.top1:.2f} % ({100 * model.interval[0]:.1f} to {100 * model.interval[1]:.1f})"


def _latency(speed: ModelSpeed) -> str:
    return f"{speed.median_ms:.1f} ms ({speed.quartiles_ms[0]:.1f} to {speed.quartiles_ms[1]:.1f})"


def change_in_percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.1f} %"


def unmeasured(report: Report) -> list[str]:
    """What a reader might look for and does not find."""
    missing = [
        (report.accuracy, "Accuracy was not measured (--eval-data)."),
        (report.calibration, "Nothing was calibrated (--calib)."),
        (report.speed, "Speed and memory were not measured."),
    ]
    return [text for facts, text in missing if facts is None and report.pruned is not None]


def measured_on(report: Report) -> str:
    """Machine and versions."""
    known = report.provenance
    text = ", ".join(
        f"{name} {known[name]}" if name != "machine" else str(known[name])
        for name in ("machine", "ssmprune", "torch", "python", "backend")
        if name in known
    )
    if report.speed is not None:
        text += f"; timed on {report.speed.device} with {report.speed.threads} threads"
    return text
