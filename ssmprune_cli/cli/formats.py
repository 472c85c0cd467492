"""`--format`: a result as tables for people, or with a row for each model, for a sheet, a page or a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import OUTPUT
from ssmprune_cli.cli.options import choice_option
from ssmprune_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMATS = ("table", "csv", "markdown", "latex", "json")
Row = Mapping[str, object]  # by column; None where there is no value

TableFormat = Annotated[
    str,
    choice_option(
        "--format",
        FORMATS,
        "Tables to read; or a row for each model, columns called as timm calls them; or all figures as JSON. One of",
        OUTPUT,
    ),
]


def chosen(form: str, *, as_json: bool) -> str:
    """The form that is asked for: `--json` is short for one of them. UsageError if both say different things."""
    if as_json and form not in ("table", "json"):
        raise UsageError(f"--json and --format {form} ask for two forms: give one of them")
    return "json" if as_json else form


def emit(result: RenderableType, rows: Callable[[], Sequence[Row]], data: Mapping[str, Any], form: str) -> None:
    """Write a command's result to stdout as `form` says: `result` for people, `rows` with the model's name first, or
    `data`."""
    if form in _WRITERS:
        output.text(_WRITERS[form](rows()))
    else:
        output.emit(result, data, as_json=form == "json")


def unique(names: Sequence[str]) -> list[str]:
    """The names; what comes again gets a number behind it."""
    found: list[str] = []
    for name in names:
        number, own = 2, name
        while own in found:
            own, number = f"{name} ({number})", number + 1
        found.append(own)
    return found


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_titles(rows))
    writer.writerows(_cells(rows))
    return text.getvalue()


def _markdown(rows: Sequence[Row]) -> str:
    ends = ["---:" if numeric else "---" for numeric in _numeric(rows)]
    lines = [_titles(rows), ends, *_cells(rows)]
    return "".join("| " + " | ".join(_flat(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _latex(rows: Sequence[Row]) -> str:
    """A tabular with the rules of booktabs."""
    head, *body = (
        " & ".join("".join(_LATEX.get(sign, sign) for sign in _flat(cell)) for cell in line) + r" \\"
        for line in (_titles(rows), *_cells(rows))
    )
    columns = "".join("r" if numeric else "l" for numeric in _numeric(rows))
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{columns}}}",
        *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
        r"\end{tabular}",
    ]
    return "\n".join(lines) + "\n"


_WRITERS: dict[str, Callable[[Sequence[Row]], str]] = {"csv": _csv, "markdown": _markdown, "latex": _latex}


def _titles(rows: Sequence[Row]) -> list[str]:
    """The columns, in the order in which they come up."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    return [[_text(row.get(column)) for column in _titles(rows)] for row in rows]


def _text(value: object) -> str:
    """Six digits of a float; what has none is empty."""
    if value is None:
        return ""
    if isinstance(value, tuple | list):
        return " ".join(map(_text, value))
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _numeric(rows: Sequence[Row]) -> list[bool]:
    return [
        all(isinstance(row.get(column), int | float | None) for row in rows) and column != "model"
        for column in _titles(rows)
    ]


def _flat(cell: str) -> str:
    return " ".join(cell.split())
