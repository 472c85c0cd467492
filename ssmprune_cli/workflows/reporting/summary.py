"""The Markdown summary: an artefact's model card, and the text of a pull request or a CI job."""

from __future__ import annotations

from collections.abc import Sequence

from ssmprune_cli.workflows.reporting import facts
from ssmprune_cli.workflows.reporting.page import Entry
from ssmprune_cli.workflows.reporting.rows import rows

_WORST_PARTS = 3


def summary(entries: Sequence[Entry]) -> str:
    """Markdown of one or several reports; every number in it comes from them."""
    if len(entries) == 1:
        return _one(entries[0])
    named = [(entry.name, entry.report) for entry in entries]
    lines = [f"# {len(entries)} models", "", *_table(*facts.side_by_side(named)), ""]
    notes = facts.unlike([report for _, report in named])
    lines += [*(f"> {text}  " for text in notes), ""] if notes else []
    return "\n".join([*lines, *(_one(entry) for entry in entries)])


def _one(entry: Entry) -> str:
    report = entry.report
    lines = [f"# {facts.title(entry.name, report)}", ""]
    verdicts = facts.verdicts(report.limits)
    if verdicts:
        lines += [f"**{verdicts[0]}**", "", *(f"- {text}" for text in verdicts[1:]), ""]
    lines += [facts.description(report), facts.method(report), *facts.eight_bits(report), *facts.repaired(report)]
    lines += facts.distilled(report)
    found = [[row.title, row.dense, row.pruned, row.whole_change] for row in rows(report)]
    if found:
        lines += ["", *_table(["", "dense", report.called, "change"], found)]
    worst = [f"{each.name} ({each.change}, {each.images} images)" for each in facts.worst(report, _WORST_PARTS)]
    if worst:
        lines += ["", f"Lost most: {', '.join(worst)}."]
    notes = [*report.warnings, *facts.unmeasured(report)]
    if notes:
        lines += ["", *(f"> {text}  " for text in notes)]
    if report.pruned is not None:
        lines += ["", facts.savings(report)]
    if report.finetuning is not None:
        lines += ["", f"Fine-tuned: `{report.finetuning.command}`; report.json has its epochs."]
    known = report.provenance
    if "input_sha256" in known:
        of = f" of {known['input_address']}" if "input_address" in known else ""
        lines += ["", f"Made from `{known['input']}`{of}, SHA-256 `{known['input_sha256']}`."]
    if "command" in known:
        lines += ["", f"    {known['command']}"]
    lines += ["", f"Load it with `ssmprune_cli.load(folder)`. Measured on {facts.measured_on(report)}."]
    return "\n".join(lines) + "\n"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(cells) for cells in (titles, ["---"] * len(titles), *rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
