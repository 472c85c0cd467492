"""The facts of a report in words, for the page and the summary alike: what both say is worded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ssmprune_cli.report import LimitFacts, Report, Sample
from ssmprune_cli.tasks import TASKS, Loss
from ssmprune_cli.workflows.reporting.rows import giga


def name(given: str, report: Report) -> str:
    """What a model is called: as given, or else by the file that it was made from."""
    return given or str(report.provenance.get("input", report.family))


def title(given: str, report: Report) -> str:
    """What the model is and what it costs, in a line."""
    own = name(given, report)
    if report.pruned is None:
        return f"{own}: all tokens kept"
    task, compared = TASKS.get(report.task), judged(report)
    lost = "" if compared is None else f", {task.metric} {100 * task.change(compared).value:+.2f} points"
    saved = saving(report)
    work = f"{100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} multiply-adds"
    return f"{own}: {', '.join([pace(report), work, *smaller(report)])}{lost}"


def gain(report: Report) -> bool | None:
    """Whether the pruned model is faster than the dense one; None if that was not measured or cannot be told."""
    if report.speed is None:
        return None
    low, high = report.speed.latency_ratio_interval
    return True if high < 1 else False if low > 1 else None


def kind(better: bool | None) -> str:
    """The class of a change on the page."""
    return "even" if better is None else "gain" if better else "loss"


def verdict(report: Report) -> str:
    """Faster or not, first of all; then what it costs."""
    if report.pruned is None:
        return "All tokens are kept: there is nothing to compare."
    speed, task, compared = report.speed, TASKS.get(report.task), judged(report)
    if speed is None:
        text = "Speed was not measured."
    else:
        low, high = speed.latency_ratio_interval
        word = {True: "Faster", False: "Slower", None: "No faster, as far as the timing tells"}[gain(report)]
        ends = f"95 % interval {1 / high:.2f} to {1 / low:.2f}"
        text = f"{word}: {1 / speed.latency_ratio:.2f} times the dense model's speed ({ends})."
    saved = saving(report)
    parts = [f"{100 * abs(saved):.1f} % {'fewer' if saved >= 0 else 'more'} multiply-adds", *smaller(report)]
    if compared is not None:
        change = task.change(compared)
        within = ""
        if change.interval is not None:
            within = f" (95 % interval {100 * change.interval[0]:+.2f} to {100 * change.interval[1]:+.2f})"
        parts.append(f"{task.metric} {100 * change.value:+.2f} points{within}")
    return f"{text} {'; '.join(parts)}."


def drawn(report: Report) -> str:
    """How the sample images were chosen."""
    changed, count = sum(sample.chosen == "changed" for sample in report.samples), len(report.samples)
    if not changed:
        return "The images are random ones."
    if changed == 1:
        return f"The first of the {count} images was chosen because its answer changed; the others are random ones."
    return (
        f"The first {changed} of the {count} images were chosen because their answers changed; the others are random "
        "ones."
    )


def smaller(report: Report) -> list[str]:
    """In what the model is smaller than the dense one, before any token is dropped: its images, its blocks."""
    found = []
    if report.resized_from is not None:
        found.append(f"image {report.resized_from[0]} -> {report.image_size[0]} pixels")
    if report.blocks_left_out:
        count = len(report.dense.tokens_per_block)
        found.append(f"blocks {count} -> {count - len(report.blocks_left_out)}")
    return found


def block_by_block(report: Report, values: Sequence[int]) -> list[int]:
    """`values` of the compressed model's blocks at the dense model's; 0 for those that are left out."""
    own = iter(values)
    blocks = range(1, len(report.dense.tokens_per_block) + 1)
    return [0 if block in report.blocks_left_out else next(own) for block in blocks]


def pace(report: Report) -> str:
    """Whether the pruned model is faster than the dense one, as far as the timing tells."""
    if report.speed is None:
        return "speed not measured"
    ratio, better = report.speed.latency_ratio, gain(report)
    if better:
        return f"{1 / ratio:.2f} times as fast"
    if better is False:
        return f"slower, {ratio:.2f} times the time"
    return "no faster, as far as the timing tells"


def savings(report: Report) -> str:
    """What a compression changes beside the answers, and what it does not."""
    text = "The number of parameters and the size of the file do not change."
    if report.blocks_left_out:
        text = "The blocks that are left out take their parameters with them."
    elif report.resized_from is not None:
        text = "The parameters do not change, but for position embeddings, which are interpolated."
    if report.eight_bits is not None and report.eight_bits.models:
        if not smaller(report):
            text = "The number of parameters does not change."
        text += " Those in eight bits take a quarter of the room."
    if report.pruning is not None and report.pruning.repair != "none":
        text += " The repair adds a few of its own."
    if report.speed is None:
        return text
    memory = report.speed.pruned.peak_memory_bytes / report.speed.dense.peak_memory_bytes
    return f"{text} A batch takes {report.speed.latency_ratio:.2f} times the time and {memory:.2f} times the memory."


def verdicts(limits: Sequence[LimitFacts]) -> list[str]:
    """Whether the limits that the user set are kept, and on each one its value, interval and bound; [] without any."""
    if not limits:
        return []
    broken = sum(not each.holds for each in limits)
    whole = f"FAIL: {broken} of {len(limits)} limits {'is' if broken == 1 else 'are'} broken."
    if not broken:
        whole = f"PASS: {'the limit is' if len(limits) == 1 else f'all {len(limits)} limits are'} kept."
    return [whole, *(f"{'PASS' if each.holds else 'FAIL'}: {each.statement}." for each in limits)]


def saving(report: Report) -> float:
    """Share of the dense multiply-adds, all directions, that pruning saves."""
    if report.pruned is None:
        return 0.0
    return 1 - report.pruned.multiply_adds_all_directions / report.dense.multiply_adds_all_directions


def description(report: Report) -> str:
    height, width = report.image_size
    whole = f"{height}x{width} pixels" if TASKS.get(report.task).shows else f"windows of {width:,} tokens"
    size = ", ".join(smaller(report)) or whole
    text = f"Family {report.family}, {size}, {report.parameters:,} parameters"
    if report.pruned is not None:
        return f"{text}."
    dense = report.dense
    return (
        f"{text}, {giga(dense.multiply_adds_all_directions)} multiply-adds with all directions, "
        f"{giga(dense.multiply_adds_one_direction)} with one."
    )


def method(report: Report) -> str:
    """Where tokens are dropped, how, and why so."""
    alone = ["smaller images"] if report.resized_from is not None else []
    alone += ["fewer blocks"] if report.blocks_left_out else []
    alone += ["weights in eight bits"] if report.eight_bits is not None and report.eight_bits.models else []
    if report.pruning is None and alone:
        text = f"{' and '.join(alone).capitalize()} alone make it cheaper: no tokens are dropped."
        return " ".join([*_left_out(report), text, *_target(report)])
    if report.pruning is None:
        return "No tokens are dropped."
    pruning = report.pruning
    return " ".join(
        [
            *_left_out(report),
            f"After {joined(pruning.points)} blocks, {joined(pruning.tokens)} patch tokens stay. Importance "
            f"{pruning.importance}, reduction {pruning.reduction}, alignment {pruning.alignment}.",
            *([] if pruning.returning == "left" else [f"A dropped token comes back by {pruning.returning!r}."]),
            *_target(report),
            *_reductions(report),
        ]
    )


def _left_out(report: Report) -> list[str]:
    """Which blocks of the dense model are missing; [] if none are."""
    numbers = report.blocks_left_out
    return [f"Blocks of the dense model that are left out: {joined(numbers)}."] if numbers else []


_TARGETS = {
    "latency_ratio": "{:.3g} of the dense model's time",
    "latency_ms": "{:.4g} ms a batch",
    "multiply_adds": "{:.4g} of the dense multiply-adds",
    "size_bytes": "a file of weights of {:,.0f} bytes",
    "max_drop": "the fastest model that loses at most {:.3g} points",
}
_MEASURED = {
    "latency_ratio": "{:.3g} were measured",
    "latency_ms": "{:.4g} were measured",
    "multiply_adds": "it has {:.4g}",
    "size_bytes": "it has {:,.0f}",
    "max_drop": "{:.2f} were measured",
}


def _target(report: Report) -> list[str]:
    target = report.target
    if target is None:
        return []
    asked, measured = _TARGETS[target.kind].format(target.value), _MEASURED[target.kind].format(target.measured)
    return [f"Asked for: {asked}; {measured}{'' if target.met else ', so it is not met'}."]


def _reductions(report: Report) -> list[str]:
    if report.reductions is None:
        return []
    shown = ", ".join(
        f"{each.reduction} {'not finite' if each.divergence is None else f'{each.divergence:.4f}'}"
        for each in report.reductions
    )
    unit = TASKS.get(report.task).unit
    return [f"Divergence of the reductions at equal time, in {unit} on the calibration images: {shown}."]


_REPAIRS = {"head": "head", "head+side": "head and side features"}


def repaired(report: Report) -> list[str]:
    """What the repair did, and what of it was refused; [] if none was asked for."""
    found = report.repair
    if found is None:
        return []
    refused = [f"{_REPAIRS[kind].capitalize()}: {why}." for kind, why in found.refused.items()]
    if found.kind == "none" or found.divergence_before is None or found.divergence_after is None:
        reasons = list(dict.fromkeys(found.refused.values()))  # one may hold for all
        return [f"Repair: none; {reasons[0]}."] if len(reasons) == 1 else ["Repair: none.", *refused]
    before, after = found.divergence_before, found.divergence_after
    within = ""
    if found.change_interval is not None:
        within = " (change {:+.3f} to {:+.3f}, 95 %)".format(*found.change_interval)
    text = (
        f"Repair: {_REPAIRS[found.kind]}, divergence {before:.3f} to {after:.3f} nats on {found.held_back:,} held-back "
        f"images{within}."
    )
    return [text, *(f"Refused: {reason}" for reason in refused)]


def distilled(report: Report) -> list[str]:
    """What the training on the calibration images did; [] if none was asked for."""
    found = report.distillation
    if found is None:
        return []
    within, after = "", "not finite"
    if found.divergence_after is not None and found.change_interval is not None:
        after = f"{found.divergence_after:.3f}"
        within = " (change {:+.3f} to {:+.3f}, 95 %)".format(*found.change_interval)
    kept = "" if found.kept else "not kept; "
    return [
        f"Distillation: {kept}{found.steps:,} steps on {found.images:,} images, divergence "
        f"{found.divergence_before:.3f} to {after} nats on {found.held_back:,} held-back images{within}, "
        f"{found.seconds:.0f} s."
    ]


def eight_bits(report: Report) -> list[str]:
    """Which weights are in eight bits, and why not the others; then what both savings do apart and together."""
    found, task = report.eight_bits, TASKS.get(report.task)
    if found is None:
        return []
    said = {True: "", False: ""}
    for chosen in said:
        kinds = [each for each in found.kinds if each.eight_bits == chosen]
        said[chosen] = joined(
            each.kind if each.divergence is None else f"{each.kind} ({each.divergence:.5f})" for each in kinds
        )
    how = ""
    if found.divergence is not None:
        seen = f"{found.images:,} {task.cases}"
        how = f"; divergence of each alone, and {found.divergence:.5f} together, in {task.unit}, {seen}"
    lines = [f"In eight bits: {said[True] or 'none'}{how}."]
    if said[False]:
        lines.append(f"In float, beside all that is no linear layer of a block: {said[False]}.")
    for each in found.models:
        name = f"{'All tokens' if each.tokens == 'all' else 'Pruned'}, {each.weights}"
        score = "" if each.score is None else f", {task.metric} {100 * each.score:.2f} %"
        lines.append(f"{name}: {each.bytes / 1e6:.2f} MB, {each.median_ms:.1f} ms a batch{score}.")
    return lines


def joined(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def side_by_side(named: Sequence[tuple[str, Report]]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table that compares reports, one a row."""
    metrics = "/".join(dict.fromkeys(TASKS.get(report.task).metric for _, report in named))
    titles = ["model", "multiply-adds of dense", metrics, "change, points (95 %)", "latency of dense", "images/s"]
    limited = any(report.limits for _, report in named)
    titles += ["limits"] if limited else []
    lines = []
    for name, report in named:
        whole = [text.partition(":")[0] for text in verdicts(report.limits)[:1]]
        task, compared, speed = TASKS.get(report.task), judged(report), report.speed
        value = change = "-"
        if compared is not None:
            value = f"{100 * task.estimate(compared).value:.2f} %"
            found = task.change(compared)
            change = f"{100 * found.value:+.2f}"
            if found.interval is not None:
                change += f" ({100 * found.interval[0]:+.2f} to {100 * found.interval[1]:+.2f})"
        lines.append(
            [
                name,
                f"{100 * (1 - saving(report)):.1f} %",
                value,
                change,
                "-" if speed is None else f"{100 * speed.latency_ratio:.1f} %",
                "-" if speed is None else f"{speed.pruned.images_per_second:.1f}",
                *((whole or ["-"]) if limited else []),
            ]
        )
    return titles, lines


def unlike(reports: Sequence[Report]) -> list[str]:
    """What makes figures of different reports hard to compare."""
    found = []
    known = [TASKS.get(report.task).quality for report in reports if judged(report) is not None]
    what = " and ".join(dict.fromkeys(known)).capitalize()
    if known and len(known) < len(reports):
        found.append(f"{what} was not measured for all of them, so not all can be compared by it.")
    if not same_images(reports):
        found.append(f"{what} was measured on different images.")
    timed = [(report.provenance.get("machine"), report.speed) for report in reports if report.speed is not None]
    if len({(place, speed.device, speed.threads, speed.backend, speed.batch_size) for place, speed in timed}) > 1:
        found.append("Speed was measured in different ways: compare it with the dense model's, not across models.")
    return found


def same_images(reports: Sequence[Report]) -> bool:
    """Whether those that were judged all were on the same images: as their provenance says, or their facts allow."""
    prints = {report.provenance.get("evaluation_sha256") for report in reports if judged(report) is not None}
    if None not in prints:
        return len(prints) <= 1
    known = [(TASKS.get(report.task), found) for report in reports if (found := judged(report)) is not None]
    counts = {compared.count for _, compared in known}
    dense = {task.estimate(compared.dense).value for task, compared in known}
    return len(counts) <= 1 and not (same_input(reports) and len(dense) > 1)


def same_input(reports: Sequence[Report]) -> bool:
    """Whether all were made from the same file."""
    sources = {report.provenance.get("input_sha256") for report in reports}
    return len(sources) == 1 and None not in sources


def judged(report: Report) -> Any | None:
    """The comparison of both models by their task, if they were compared."""
    return TASKS.get(report.task).facts(report)


def test(report: Report) -> str:
    """The paired test of both models, as a sentence; "" if they were not compared."""
    compared = judged(report)
    return "" if compared is None else TASKS.get(report.task).test(compared)


def worst(report: Report, count: int) -> list[Loss]:
    """Of the parts of the data on which the pruned model does worse, the `count` that lost most."""
    compared = judged(report)
    return [] if compared is None else TASKS.get(report.task).losses(compared, count)


def parts(report: Report) -> tuple[str, str]:
    """What these parts are called, one and several."""
    return TASKS.get(report.task).parts


def answers(report: Report, sample: Sample) -> str:
    """What both models say of a sample, and whether that is right."""
    return TASKS.get(report.task).answers(report, sample)


def epochs(report: Report) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table with what each epoch of a fine-tuning came to."""
    task, lines = TASKS.get(report.task), []
    for epoch in () if report.finetuning is None else report.finetuning.epochs:
        metric = getattr(epoch, task.key)
        loss = "-" if epoch.loss is None else f"{epoch.loss:.4f}"
        lines.append([str(epoch.epoch), loss, "-" if metric is None else f"{100 * metric:.2f} %"])
    return ["epoch", "loss", task.metric], lines


def part_metric(report: Report) -> str:
    """What is said of a part of the data."""
    return TASKS.get(report.task).part_metric


def unit(report: Report) -> str:
    """Of divergences."""
    return TASKS.get(report.task).unit


def unharmed(report: Report) -> str:
    """What to say where no part of the data is worse than before."""
    return TASKS.get(report.task).unharmed


def unmeasured(report: Report) -> list[str]:
    """What a reader might look for and does not find."""
    if report.pruned is None:
        return []
    quality = TASKS.get(report.task).quality.capitalize()
    reason = f"{quality} was not measured (--data)."
    if report.finetuning is not None:
        reason = f"{quality} was not compared with the dense model since the fine-tuning (ssmprune eval --compare)."
    missing = [
        (judged(report), reason),
        (report.speed, "Speed and memory were not measured."),
    ]
    return [text for facts, text in missing if facts is None]


_ORIGINS = {
    "input": "input file",
    "input_sha256": "its SHA-256",
    "input_address": "its address on the hub",
    "weights_sha256": "SHA-256 of the weights in it",
    "backend": "kernels",
    "calibration_images": "calibration images",
    "calibration_sha256": "their SHA-256",
    "evaluation_dataset": "kind of the evaluation images",
    "evaluation_slide": "windows that they are seen through (crop, stride; pixels)",
    "evaluation_sha256": "SHA-256 of the names and labels of the evaluation images",
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
