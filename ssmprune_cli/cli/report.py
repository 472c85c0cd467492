"""`ssmprune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import OUTPUT
from ssmprune_cli.errors import UsageError

_SUFFIXES = {"html": (".html", ".htm"), "markdown": (".md", ".markdown", ".txt")}


def command(
    artefacts: Annotated[list[Path], typer.Argument(help="Folders that `ssmprune compress` or `finetune` wrote.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="File to write. Default: report.html in the folder; Markdown goes to stdout.", rich_help_panel=OUTPUT
        ),
    ] = None,
    form: Annotated[
        Literal["html", "markdown"],
        typer.Option("--format", help="html, or markdown for a pull request or CI job.", rich_help_panel=OUTPUT),
    ] = "html",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the facts as JSON and write nothing.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Make the report of a compressed model again, or one that compares several.

    A sensitivity.json in the folder (`ssmprune sensitivity CKPT --calib DIR --out FOLDER`) becomes part of it.
    """
    if as_json and (out is not None or form == "markdown"):
        raise UsageError("--json goes to stdout, so it takes no --out and no other --format")
    kinds = _SUFFIXES[form]
    if out is not None and not out.is_dir() and out.suffix.lower() not in kinds:
        raise UsageError(
            f"{form} is not written to {out.name}",
            where="--out",
            hint=f"Give a name that ends in {' or '.join(kinds)}.",
        )
    if len(artefacts) > 1 and form == "html" and out is None and not as_json:
        raise UsageError("several artefacts have no folder in common", hint="Give `--out FILE.html`.")

    from ssmprune_cli.workflows.reporting import PAGE, page, read_entries, summary
    from ssmprune_cli.workflows.write import check_place, write_text

    check_place(out)
    entries = read_entries(artefacts)
    if as_json:
        output.json_text({"reports": [{"name": each.name, **each.report.to_dict()} for each in entries]})
        return
    if form == "markdown":
        text = summary(entries)
        if out is None:
            output.text(text)
            return
    else:
        text = page(entries)
        out = out or artefacts[0] / PAGE
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    output.note(f"Written to {out}")
