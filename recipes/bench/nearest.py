"""What a search wins at equal time, beside the best reduction and the smaller image, by the tables of equal_time.py.

    python recipes/bench/nearest.py benchmarks/results/equal_time_*.csv [--csv benchmarks/results/nearest.csv]

prints a Markdown table, and with --csv FILE writes it too. A row is one checkpoint, batch size and share of the time.

best reduction  the one with the fewest nats among those at the default points, not repaired
smaller image   alone, not repaired
searched        what `compress --target-latency-ratio` returns, repaired as it is by default
against ...     the nats of "searched" less than theirs, as a share of theirs: -40 % is nearer to the dense model
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

from tables import Tables, read

Row = Mapping[str, str]


def number(cell: str) -> float:
    """The figure of a cell without its spread."""
    return float(cell.split()[0])


def nearest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: number(row["nats"]), default=None)


def change(searched: Row, other: Row | None) -> str:
    return "" if other is None else f"{100 * (number(searched['nats']) / number(other['nats']) - 1):+.0f} %"


def named(row: Row | None) -> str:
    return "none reaches it" if row is None else f"{row['method']}, {row['nats']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--csv", type=Path, help="write the table to this file")
    arguments = parser.parse_args()
    groups: dict[tuple[str, str, str], list[Row]] = {}
    machines: list[str] = []
    for path in arguments.files:
        table = read(path)
        machines.append(table.about.get("machine", ""))
        for cells in table.rows:
            row = dict(zip(table.titles, cells, strict=True))
            groups.setdefault((row["checkpoint"], row["batch"], row["time asked"]), []).append(row)
    tables = Tables(arguments.csv)
    tables.start(
        "",
        "checkpoint",
        "batch",
        "time asked",
        "best reduction, nats",
        "smaller image, nats",
        "searched, nats",
        "against the reduction",
        "against the smaller image",
        "points more than the reduction",
        "what was found",
    )
    for (checkpoint, batch, share), rows in sorted(groups.items()):
        searched = [row for row in rows if row["method"] == "searched"]
        if not searched:
            continue
        plain = [row for row in rows if row["repair"] == "none"]
        own = searched[-1]  # a repaired model comes after itself
        reduction = nearest(row for row in plain if "/" in row["method"])
        image = nearest(row for row in plain if row["method"] == "smaller image")
        points = "" if reduction is None else f"{number(own['top-1 %']) - number(reduction['top-1 %']):+.1f}"
        against = (change(own, reduction), change(own, image), points)
        figures = (named(reduction), "none reaches it" if image is None else image["nats"], own["nats"])
        tables.row(checkpoint, batch, share, *figures, *against, own["what"])
    each = " Or: ".join(dict.fromkeys(machines))
    tables.measured_on(f"from {len(machines)} tables, which say where each was measured. {each}")


if __name__ == "__main__":
    main()
