"""Tables of measurements: printed as Markdown while they grow, kept as CSV, and read again for docs/results.md.

A file holds one table. Lines that start with `# key: value` say where it comes from (command, date, machine, notes). A
measured cell is split, so that programs can read it: "6.3 (6.0 to 6.4)" fills the columns `name`, `name [low]` and
`name [high]`; "0.22 ± 0.01" fills `name` and `name [±]`; "317 (1.10x)" fills `name` and `name [times]`.
"""

from __future__ import annotations

import csv
import io
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

# The parts of a split cell: the columns that hold the rest of it, how it reads, and how it is told.
SPREADS = (
    (("low", "high"), "{} ({} to {})", re.compile(r"(\S+) \((\S+) to (\S+)\)")),
    (("±",), "{} ± {}", re.compile(r"(\S+) ± (\S+)")),
    (("times",), "{} ({})", re.compile(r"(\S+) \(([\d.]+x)\)")),
)


@dataclass
class Table:
    """Rows of text under `titles`; `about` says where they come from."""

    titles: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)
    about: dict[str, str] = field(default_factory=dict)

    def select(self, columns: Sequence[str] = (), where: Mapping[str, Sequence[str]] | None = None) -> Table:
        """Some columns, all when none are named, of the rows whose cells are among those that `where` lists.

        Raises KeyError for a column that the table does not have.
        """
        index = {title: place for place, title in enumerate(self.titles)}
        places = [index[title] for title in columns or self.titles]
        kept = {index[title]: set(values) for title, values in (where or {}).items()}
        rows = [row for row in self.rows if all(row[place] in values for place, values in kept.items())]
        return Table(
            tuple(self.titles[place] for place in places),
            [tuple(row[place] for place in places) for row in rows],
            self.about,
        )

    def markdown(self) -> str:
        lines = [self.titles, ("---",) * len(self.titles), *self.rows]
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(path: Path, table: Table) -> None:
    """Write `table` as CSV, its measured cells split."""
    columns: list[tuple[str, ...]] = []
    for place, title in enumerate(table.titles):
        cells = [row[place] for row in table.rows]
        for parts, _, pattern in SPREADS:
            if any(pattern.fullmatch(cell) for cell in cells):
                columns += zip(
                    *[(title, *(f"{title} [{part}]" for part in parts))],
                    *[
                        found.groups() if (found := pattern.fullmatch(cell)) else (cell, *[""] * len(parts))
                        for cell in cells
                    ],
                    strict=True,
                )
                break
        else:
            columns.append((title, *cells))
    text = io.StringIO()
    for key, value in table.about.items():
        text.write(f"# {key}: {value}\n")
    csv.writer(text, lineterminator="\n").writerows(zip(*columns, strict=True))
    path.write_text(text.getvalue(), encoding="utf-8")


def read(path: Path) -> Table:
    """The table in a file that `write` made, its measured cells put together again."""
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line for line in lines if line.startswith("# ")]
    about = dict(line[2:].split(": ", 1) for line in comments)
    titles, *rows = csv.reader(lines[len(comments) :])
    found: list[tuple[str, list[str]]] = []
    place = 0
    while place < len(titles):
        title = titles[place]
        for parts, form, _ in SPREADS:
            if titles[place + 1 : place + 1 + len(parts)] == [f"{title} [{part}]" for part in parts]:
                width = 1 + len(parts)
                found.append((title, [_joined(form, row[place : place + width]) for row in rows]))
                break
        else:
            width = 1
            found.append((title, [row[place] for row in rows]))
        place += width
    return Table(tuple(title for title, _ in found), list(zip(*(cells for _, cells in found), strict=True)), about)


def _joined(form: str, parts: Sequence[str]) -> str:
    return form.format(*parts) if parts[1] else parts[0]


def _print(text: str) -> None:
    print(text, flush=True)


class Tables:
    """The tables that one run of a script prints, and writes as CSV after every row if `path` is set.

    A script of one table writes `path` itself. A table with a name of its own goes beside it: scan in speed.csv is
    speed_scan.csv.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None] = _print) -> None:
        self._path, self._say = path, say
        self._about = {
            "command": f"python {shlex.join(sys.argv)}",
            "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        }
        self._written: dict[Path, Table] = {}
        self._row: Callable[[Sequence[str]], None] = lambda cells: None

    def start(self, name: str, *titles: str) -> None:
        """Begin a table: its rows follow."""
        table = Table(titles, about=dict(self._about))
        path = self._path and (self._path.with_stem(f"{self._path.stem}_{name}") if name else self._path)
        self._say("\n" + table.markdown().rstrip("\n"))

        def row(cells: Sequence[str]) -> None:
            table.rows.append(tuple(cells))
            if path is not None:
                self._written[path] = table
                write(path, table)

        self._row = row

    def row(self, *cells: str) -> None:
        self._say(f"| {' | '.join(cells)} |")
        self._row(cells)

    def measured_on(self, machine: str) -> None:
        """Print on what all tables are measured, those before and those to come, and note it in their files."""
        self._say(f"\n{machine}")
        self._about["machine"] = machine
        for path, table in self._written.items():
            table.about["machine"] = machine
            write(path, table)
