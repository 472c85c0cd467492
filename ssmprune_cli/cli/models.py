"""`ssmprune models list|show`."""

from __future__ import annotations

from typing import Annotated

import typer

from ssmprune_cli.catalogue import Entry, entries, find_entry
from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import Command
from ssmprune_cli.cli.options import AsJson
from ssmprune_cli.cli.quiet import quietly

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List and show published checkpoints.")

_TITLES = {"top1": "top-1", "top5": "top-5", "miou": "mIoU", "box_ap": "box AP", "mask_ap": "mask AP"}


@app.command("list", cls=Command)
@quietly
def list_models(as_json: AsJson = False) -> None:
    """List the checkpoints that their authors publish and ssmprune reads, with the published accuracy."""
    from rich.table import Table

    table = Table()
    table.add_column("name", no_wrap=True)
    table.add_column("trained on")
    table.add_column("published, %")
    table.add_column("parameters", justify="right")
    for entry in entries():
        parameters = "" if entry.parameters is None else f"{entry.parameters / 1e6:.1f} M"
        table.add_row(entry.name, entry.dataset, _accuracy(entry), parameters)
    output.emit(table, {"models": [entry.model_dump(mode="json") for entry in entries()]}, as_json=as_json)


@app.command("show", cls=Command)
@quietly
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of `ssmprune models list`, or the file's name.")],
    as_json: AsJson = False,
) -> None:
    """Say where a published checkpoint is, what its authors say of it, and what to type with it.

    What nobody states, such as a checksum, is left out: `ssmprune inspect FILE` prints the one of your file.
    """
    from rich.console import Group

    from ssmprune_cli.cli.tables import facts_table

    entry = find_entry(name)
    facts = {key: value for key, value in entry.model_dump(exclude_none=True).items() if key not in ("name", "hub")}
    facts["published"] = _accuracy(entry) or None
    lines = [f"Try `ssmprune inspect {entry.checkpoint}`."]
    if entry.hub is None:
        lines.insert(0, f"Download {entry.file} from the address above.")
    output.emit(Group(facts_table(facts), *lines), entry.model_dump(mode="json"), as_json=as_json)


def _accuracy(entry: Entry) -> str:
    return ", ".join(f"{_TITLES[key]} {value:g}" for key, value in entry.published.items())
