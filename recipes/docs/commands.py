"""docs/commands.md: every command with its arguments and options, from the app itself.

    python recipes/docs/commands.py

writes the page. Its text is what `--help` prints: change it in ssmprune_cli/cli/ and run this again.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from ssmprune_cli.cli.app import app
from ssmprune_cli.cli.help import panels

PAGE = Path(__file__).parents[2] / "docs" / "commands.md"
PREFACE = """\
<!-- Written by `python recipes/docs/commands.py`: change the help of the commands, not this page. -->

# Commands

This is what `ssmprune COMMAND --help` prints. Results go to stdout. Progress, warnings and errors go to stderr.
Commands with a result take `--json`, which prints one object.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an error, which says what to type next; `ssmprune --debug COMMAND` shows the traceback |
| 2 | wrong usage |
| 3 | a limit that you set is broken |
| 130 | interrupted |
"""


def page() -> str:
    """The whole page, as Markdown."""
    return PREFACE + "".join(_sections(typer.main.get_command(app), "ssmprune", None))


def _sections(command: Any, path: str, parent: Any) -> Iterator[str]:
    """A section a command, groups first. Typer has click's classes under names of its own, hence `Any`."""
    with command.make_context(path.rpartition(" ")[2], [], parent=parent, resilient_parsing=True) as context:
        commands = getattr(command, "commands", {})
        if not (commands and parent is None):
            yield f"\n## {path}\n"
        pieces = " ".join(command.collect_usage_pieces(context))
        yield f"\n```\n{path} {pieces}\n```\n"
        for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
            yield f"\n{_escaped(' '.join(paragraph.split()))}\n"
        for title, records in panels(command, context):
            yield f"\n| {title} | |\n| --- | --- |\n"
            for names, text in records:
                name = _escaped(f"`{' '.join(names.split())}`")
                yield f"| {name} | {_escaped(' '.join(text.split()))} |\n"
        for each, inner in commands.items():
            yield from _sections(inner, f"{path} {each}", context)


def _escaped(text: str) -> str:
    """Text in which Markdown sees no table, tag or emphasis, `code` aside."""
    parts = text.split("`")
    for place in range(0, len(parts), 2):
        for sign in "\\|<>*_[":
            parts[place] = parts[place].replace(sign, f"\\{sign}")
    for place in range(1, len(parts), 2):
        parts[place] = parts[place].replace("|", "\\|")
    return "`".join(parts)


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
