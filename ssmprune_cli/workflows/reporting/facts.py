"""The facts of a report in words, for the page and the summary alike: what both say is worded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ssmprune_cli.report import AccuracyFacts, ClassChange, Report, Sample
from ssmprune_cli.workflows.reporting.rows import giga


def title(name: str, report: Report) -> str:
    """What the model is and what it costs, in a line."""
    name = name or str(report.provenance.get("input", report.family))
    if report.pruned is None:
        return f"{name}: all tokens kept"
    lost = "" if report.accuracy is None else f", top-1 {100 * report.accuracy.difference:+.2f} points"
    saved = saving(report)
    return f"{name}: {100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} multiply-adds{lost}"


def saving(report: Report) -> float:
    """Share of the dense multiply-adds, all directions, that pruning saves."""
    if report.pruned is None:
        return 0.0
    return 1 - report.pruned.multiply_adds_all_directions / report.dense.multiply_adds_all_directions


def description(report: Report) -> str:
    height, width = report.image_size
    text = f"Family {report.family}, {height}x{width} pixels, {report.parameters:,} parameters"
    if report.pruned is not None:
        return f"{text}."
    dense = report.dense
    return (
        f"{text}, {giga(dense.multiply_adds_all_directions)} multiply-adds with all directions, "
        f"{giga(dense.multiply_adds_one_direction)} with one."
    )


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


def side_by_side(named: Sequence[tuple[str, Report]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table that compares reports, one a row."""
    titles = ["model", "multiply-adds of dense", "top-1", "change, points (95 %)", "latency of dense", "images/s"]
    lines = []
    for name, report in named:
        accuracy, speed = report.accuracy, report.speed
        change = "-"
        if accuracy is not None:
            low, high = accuracy.difference_interval
            change = f"{100 * accuracy.difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
        lines.append(
            [
                name,
                f"{100 * (1 - saving(report)):.1f} %",
                "-" if accuracy is None else f"{100 * accuracy.top1:.2f} %",
                change,
                "-" if speed is None else f"{100 * speed.latency_ratio:.1f} %",
                "-" if speed is None else f"{speed.pruned.images_per_second:.1f}",
            ]
        )
    return titles, lines


def unlike(reports: Sequence[Report]) -> list[str]:
    """What makes figures of different reports hard to compare."""
    found = []
    judged = [report.accuracy for report in reports if report.accuracy is not None]
    if judged and len(judged) < len(reports):
        found.append("Accuracy was not measured for all of them, so not all can be compared by it.")
    if len({each.count for each in judged}) > 1 or (
        same_input(reports) and len({each.dense.top1 for each in judged}) > 1
    ):
        found.append("Accuracy was measured on different images.")
    timed = [(report.provenance.get("machine"), report.speed) for report in reports if report.speed is not None]
    if len({(place, speed.device, speed.threads, speed.backend, speed.batch_size) for place, speed in timed}) > 1:
        found.append("Speed was measured in different ways: compare it with the dense model's, not across models.")
    return found


def same_input(reports: Sequence[Report]) -> bool:
    """Whether all were made from the same file."""
    sources = {report.provenance.get("input_sha256") for report in reports}
    return len(sources) == 1 and None not in sources


def p_value(accuracy: AccuracyFacts) -> str:
    return f"p = {accuracy.p_value:.2g}" if accuracy.p_value >= 1e-4 else "p < 0.0001"


def worst(report: Report, count: int) -> list[ClassChange]:
    """Of the classes with fewer right answers than before, the `count` that lost most."""
    classes = report.accuracy.classes if report.accuracy is not None else ()
    return [each for each in classes if each.right_pruned < each.right_dense][:count]


def class_title(change: ClassChange) -> str:
    return change.name or f"class {change.index}"


def class_change(change: ClassChange) -> str:
    return f"{100 * (change.right_pruned - change.right_dense) / change.images:+.1f} points"


def class_names(report: Report) -> dict[int, str]:
    """Of the classes whose names are known."""
    classes = report.accuracy.classes if report.accuracy is not None else ()
    return {each.index: each.name for each in classes if each.name is not None}


def verdicts(report: Report, sample: Sample) -> str:
    """What both models say of a sample, and whether that is right."""
    names = class_names(report)

    def said(index: int) -> str:
        judged = "" if sample.label is None else " (right)" if index == sample.label else " (wrong)"
        return names.get(index, f"class {index}") + judged

    truth = "" if sample.label is None else f", {names.get(sample.label, f'class {sample.label}')}"
    return (
        f"{sample.name}{truth}: the dense model says {said(sample.predicted_dense)}, "
        f"the pruned one {said(sample.predicted_pruned)}"
    )


def unmeasured(report: Report) -> list[str]:
    """What a reader might look for and does not find."""
    if report.pruned is None:
        return []
    accuracy = "Accuracy was not measured (--eval-data)."
    if report.finetuning is not None:
        accuracy = "Accuracy was not compared with the dense model since the fine-tuning (ssmprune eval --compare)."
    missing = [
        (report.accuracy, accuracy),
        (report.speed, "Speed and memory were not measured."),
    ]
    return [text for facts, text in missing if facts is None]


_ORIGINS = {
    "input": "input file",
    "input_sha256": "its SHA-256",
    "weights_sha256": "SHA-256 of the weights in it",
    "backend": "kernels",
    "calibration_images": "calibration images",
    "calibration_sha256": "their SHA-256",
}


def origins(report: Report) -> list[tuple[str, str]]:
    """Where the model comes from and what it was made and measured on, by name."""
    found = [
        (_ORIGINS.get(key, key), str(value))
        for key, value in report.provenance.items()
        if key not in {"command", "backends_refused"} and value is not None
    ]
    refused = report.provenance.get("backends_refused")
    reasons = [
        f"{name}: {reason}"
        for name, reason in (refused.items() if isinstance(refused, dict) else ())
        if not str(reason).startswith("does not compute on")  # nobody expects a GPU's kernels on a CPU
    ]
    return [*found, *([("kernels refused", "; ".join(reasons))] if reasons else [])]


def measured_on(report: Report) -> str:
    """Machine and versions."""
    known = report.provenance
    text = ", ".join(
        f"{name} {known[name]}" if name != "machine" else str(known[name])
        for name in ("machine", "ssmprune", "torch", "python", "backend")
        if name in known
    )
    if report.speed is not None:
        threads = f"{report.speed.threads} thread{'s' if report.speed.threads != 1 else ''}"
        text += f"; timed on {report.speed.device} with {threads}"
    return text
