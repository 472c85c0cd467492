"""`ssmprune inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.options import AsJson, reads_checkpoints
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@reads_checkpoints
def command(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint file or an artefact folder.")],
    reading: Reading = NOTHING_SAID,
    as_json: AsJson = False,
) -> None:
    """Say what is in a checkpoint: family, size, tokens, scan directions, contents, dtype, checksum, preprocessing.

    Of a file of no known family, say which mixers its keys show, and the Python to start from.
    """
    from rich.console import Group
    from rich.text import Text

    from ssmprune_cli.cli.tables import facts_table
    from ssmprune_cli.workflows.inspect import ForeignInspection, look

    found = look(path, reading)
    if isinstance(found, ForeignInspection):
        output.warn(
            "the file is of no known family: commands take it with --module, your own code; in Python it can be pruned"
        )
        lines = (facts_table({"mixers": found.lines, "parameters": found.parameters}), f"SHA-256 {found.sha256}")
        output.emit(Group(*lines, Text(found.sketch)), found.to_dict(), as_json=as_json)
        return
    facts = found.to_dict()
    if facts["non_finite"]:
        output.warn(f"{len(facts['non_finite'])} weights hold infinite values or NaN; the file would not be loaded")
    for note in facts["notes"]:
        output.warn(note)
    of_clips = () if facts["frames"] else ("frames", "tubelet")
    rest = {key: value for key, value in facts.items() if key not in ("sha256", "notes", *of_clips)}
    # On a line of its own, so that it can be compared and copied whole.
    output.emit(Group(facts_table(rest), f"SHA-256 {facts['sha256']}"), facts, as_json=as_json)
