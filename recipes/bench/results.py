"""The tables and plots of the documentation, made from benchmarks/results/*.csv.

    python recipes/bench/results.py [PAGE.md ...]

writes what stands between a marker and its end, in README.md and every page under docs/:

    <!-- table: speed_pruned; columns: keep, reduction | ms a batch; where: Vim-T, 224 x 224 = batch 8 -->
    <!-- end -->

    <!-- files -->
    <!-- end -->

`columns` (all, if left out) are separated by |, and so are the values that `where` allows a column. Every condition of
`where` is one more `; where:`. A row is never changed: a figure in a page is a figure in a file. "files" lists the
files. Plots go to docs/drawings.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import lengths
from tables import Table, read

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = {"lengths": lengths.picture}  # each of the file of its name
MARKER = re.compile(r"(<!-- (?:table: (.+?)|files) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """The pages that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """`text` with the table of every marker made again. Raises KeyError for a column that a file does not have."""
    return MARKER.sub(lambda found: found[1] + (_section(found[2]) if found[2] else _files()) + found[3], text)


def _section(marker: str) -> str:
    name, *options = (part.strip() for part in marker.split(";"))
    columns: list[str] = []
    where: dict[str, list[str]] = {}
    for option in options:
        key, _, value = (part.strip() for part in option.partition(":"))
        if key == "columns":
            columns = [column.strip() for column in value.split("|")]
        elif key == "where":
            column, _, allowed = value.partition("=")
            where[column.strip()] = [each.strip() for each in allowed.split("|")]
        else:
            raise KeyError(f"{name}: no option {key!r}; there are columns and where")
    table = read(RESULTS / f"{name}.csv")
    chosen = table.select(columns, where)
    if not chosen.rows:
        raise KeyError(f"{name}: no row has {where}")
    return f"\n{chosen.markdown()}\n{_source(name, table)}\n\n"


def _files() -> str:
    tables = {path.name: read(path).about for path in sorted(RESULTS.glob("*.csv"))}
    listed = Table(("file", "date", "command"))
    listed.rows += [(f"`{name}`", about["date"], f"`{about['command']}`") for name, about in tables.items()]
    return f"\n{listed.markdown()}\n"


def _source(name: str, table: Table) -> str:
    about = table.about
    facts = "; ".join(about[key].rstrip(".") for key in ("machine", "note") if key in about)
    return f"`{about['command']}`, {about['date']}. {facts}. All of it: `benchmarks/results/{name}.csv`."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="*", default=pages())
    for page in parser.parse_args().pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")
    for name, draw in PLOTS.items():
        (ROOT / "docs" / "drawings" / f"{name}.svg").write_text(draw(RESULTS / f"{name}.csv"), encoding="utf-8")


if __name__ == "__main__":
    main()
