"""Help: options in groups, the same ones in every command."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

ARGUMENTS, INPUT, HOW_MUCH, METHOD, SEARCH, TRAINING, DATA, LIMITS, OUTPUT, DEVICE, OPTIONS = PANELS = (
    "Arguments",
    "Input",
    "How much",
    "Method",
    "Search",
    "Training",
    "Data",
    "Limits",
    "Output",
    "Device",
    "Options",
)


_KINDS = {"<path>": "PATH", "<int>": "N", "<int range>": "N", "<float>": "NUMBER", "<str>": "TEXT"}  # Typer's words


def panels(command: Any, context: Any) -> list[tuple[str, list[tuple[str, str]]]]:
    """The panels of a command in their order, each with the lines of its options: names, and what they do."""
    lines: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            for words, name in _KINDS.items():
                record = (record[0].replace(words, name), record[1])
            own = ARGUMENTS if parameter.param_type_name == "argument" else OPTIONS
            lines.setdefault(getattr(parameter, "rich_help_panel", None) or own, []).append(record)
    return sorted(lines.items(), key=lambda panel: PANELS.index(panel[0]))


_KEPT_HYPHEN = "\N{NON-BREAKING HYPHEN}"


class Command(TyperCommand):
    """A command whose help has its options in panels, as plain text: rich would take as long as all the rest."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        for title, lines in panels(self, ctx):
            with formatter.section(title):
                # A name such as frozen-near stays in one piece, so that it can be copied.
                formatter.write_dl([(names, text.replace("-", _KEPT_HYPHEN)) for names, text in lines])
        formatter.buffer = [text.replace(_KEPT_HYPHEN, "-") for text in formatter.buffer]
