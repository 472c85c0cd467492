"""The Markdown summary: an artefact's model card, and the text of a pull request or a CI job."""

from __future__ import annotations

from collections.abc import Sequence

from ssmprune_cli.workflows.reporting import facts
from ssmprune_cli.workflows.reporting.page import Entry


def summary(entries: Sequence[Entry]) -> str:
    """Markdown of one or several reports; every number in it comes from them."""
    if len(entries) == 1:
        return _one(entries[0])
    titles = ["model", *(row.title for row in facts.rows(entries[0].report) if row.key)]
    lines = [f"# {len(entries)} models", "", _line(titles), _line(["---"] * len(titles))]
    for entry in entries:
        found = {row.title: f"{row.dense} -> {row.pruned}, {row.change}" for row in facts.rows(entry.report)}
        lines.append(_line([entry.name, *(found.get(title, "-") for title in titles[1:])]))
    return "\n".join([*lines, "", *(_one(entry) for entry in entries)])


def _one(entry: Entry) -> str:
    report = entry.report
    lines = [f"# {facts.title(entry.name, report)}", "", facts.description(report), facts.method(report)]
    found = facts.rows(report)
    if found:
        lines += ["", _line(["", "dense", "pruned", "change"]), _line(["---"] * 4)]
        lines += [_line([row.title, row.dense, row.pruned, row.change]) for row in found]
    lines += [""] + [f"> {text}  " for text in (*report.warnings, *facts.unmeasured(report))]
    if report.pruned is not None:
        lines += ["", "The number of parameters does not change: pruning saves time and memory, not file size."]
    if report.finetuning is not None:
        lines += ["", f"Fine-tuned: `{report.finetuning.get('command')}`; report.json has its epochs."]
    known = report.provenance
    if "input_sha256" in known:
        lines += ["", f"Made from `{known['input']}`, SHA-256 `{known['input_sha256']}`."]
    if "command" in known:
        lines += ["", f"    {known['command']}"]
    lines += ["", f"Load it with `ssmprune_cli.load(folder)`. Measured on {facts.measured_on(report)}."]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
