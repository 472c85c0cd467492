"""The page: one HTML file that needs nothing else, made by Jinja2 from `page.html.j2` and `page.css`."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.files import distinct_names, read_bytes
from ssmprune_cli.report import Report, SampleStage, read_report
from ssmprune_cli.tasks import Loss
from ssmprune_cli.workflows.reporting import facts
from ssmprune_cli.workflows.reporting.drawn import front_figures, search_figure, sensitivity_figure
from ssmprune_cli.workflows.reporting.rows import rows

_WORST_PARTS = 10
_LONG = 12  # rows of a table that is not folded away
_MOST_BYTES = 1 << 25  # of a sample image: ours have a thousandth of it
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One report on a page: what it is called, if it needs a name, and the bytes of its sample images, by file."""

    name: str
    report: Report
    images: Mapping[str, bytes]


def read_entries(folders: Sequence[Path]) -> list[Entry]:
    """The reports of artefact folders, by the shortest ends of their paths that tell them apart.

    Raises SsmpruneError naming the file that is missing or damaged.
    """
    return [_read_entry(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]


def _read_entry(folder: Path, name: str) -> Entry:
    report = read_report(folder)
    images = {}
    for sample in report.samples:
        for file in (sample.file, *sample.pictures.values()):
            path = folder / Path(file).name  # never outside the folder, whatever the report says
            images[file] = read_bytes(path, _MOST_BYTES, SsmpruneError)
    return Entry(name, report, images)


@cache
def template() -> Template:
    """Compiled once in a process: that takes longer than to fill it in."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.j2")


def page(entries: Sequence[Entry]) -> str:
    """HTML of one report, or of several with a comparison first."""
    named = [(entry.name, entry.report) for entry in entries]
    return template().render(
        entries=entries,
        named=named,
        reports=[report for _, report in named],
        facts=facts,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        fronts=front_figures(named) if len(entries) > 1 else [],
        image_data=_image_data,
        dropped_path=_dropped_path,
        hatch_path=_hatch_path,
        loss_rows=_loss_rows,
        rows=rows,
        worst_parts=_WORST_PARTS,
        sensitivity_figure=sensitivity_figure,
        search_figure=search_figure,
        with_unit=_with_unit,
        unbroken=_unbroken,
        long=_LONG,
        max=partial(max, default=0),
    )


def _with_unit(cell: object) -> str:
    """A number keeps its unit: a line does not break between them."""
    return re.sub(r" (%|G|ms|MiB|points)(?!\w)", "\u00a0\\1", str(cell))


def _unbroken(text: str) -> str:
    """An interval in brackets stays on one line, too."""
    return re.sub(r"\(.*?\)", lambda found: found[0].replace(" ", "\u00a0"), _with_unit(text))


def _image_data(entry: Entry, file: str) -> str:
    return "data:image/png;base64," + base64.b64encode(entry.images[file]).decode()


def _loss_rows(losses: Sequence[Loss]) -> list[tuple[object, ...]]:
    return [(each.name, each.images, each.dense, each.pruned, each.change) for each in losses]


def _hatch_path(stage: SampleStage) -> str:
    """An SVG path with a diagonal in each cell that is dropped, in a grid of unit squares."""
    rows, columns = stage.grid
    kept = set(stage.kept)
    gone = (divmod(cell, columns) for cell in range(rows * columns) if cell not in kept)
    return "".join(f"M{column} {row + 1}l1-1" for row, column in gone)


def _dropped_path(stage: SampleStage) -> str:
    """An SVG path over the cells that are dropped, in a grid of unit squares: one rectangle for each run in a row."""
    rows, columns = stage.grid
    kept, parts = set(stage.kept), []
    for row in range(rows):
        start = None
        for column in range(columns + 1):
            gone = column < columns and row * columns + column not in kept
            if gone and start is None:
                start = column
            elif not gone and start is not None:
                parts.append(f"M{start} {row}h{column - start}v1h{start - column}z")
                start = None
    return "".join(parts)
