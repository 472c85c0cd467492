"""The page: one HTML file that needs nothing else, made by Jinja2 from `page.html.j2` and `page.css`."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.report import ClassChange, Report, Sample, SampleStage, read_report
from ssmprune_cli.workflows.plot import Series, plot
from ssmprune_cli.workflows.reporting import facts
from ssmprune_cli.workflows.traces import search_series, sensitivity_series

_WORST_CLASSES = 10
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Entry:
    """One report on a page: what it is called, if it needs a name, and the bytes of its sample images, by file."""

    name: str
    report: Report
    images: Mapping[str, bytes]


def read_entry(folder: Path) -> Entry:
    """The report of an artefact folder. Raises SsmpruneError naming the file that is missing or damaged."""
    report = read_report(folder)
    images = {}
    for sample in report.samples:
        path = folder / Path(sample.file).name  # never outside the folder, whatever the report says
        try:
            images[sample.file] = path.read_bytes()
        except OSError as error:
            raise SsmpruneError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return Entry(folder.resolve().name, report, images)


def page(entries: Sequence[Entry]) -> str:
    """HTML of one report, or of several with a comparison first."""
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.j2")
    return template.render(
        entries=entries,
        facts=facts,
        css=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        fronts=_fronts(entries) if len(entries) > 1 else [],
        image_data=_image_data,
        dropped_path=_dropped_path,
        worst=_worst,
        sensitivity_plot=_sensitivity_plot,
        search_plot=_search_plot,
        enumerate=enumerate,
        max=partial(max, default=0),
        zip=zip,
    )


def _image_data(entry: Entry, sample: Sample) -> str:
    return "data:image/png;base64," + base64.b64encode(entry.images[sample.file]).decode()


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


def _worst(report: Report) -> list[ClassChange]:
    """The classes that lost most."""
    assert report.accuracy is not None
    return [each for each in report.accuracy.classes if each.right_pruned < each.right_dense][:_WORST_CLASSES]


def _sensitivity_plot(report: Report) -> Markup:
    series = sensitivity_series(report.sensitivity or ())
    return Markup(plot(series, title="Sensitivity", x_label="pruned after block", y_label="divergence, nats"))


def _search_plot(report: Report) -> Markup:
    series, label = search_series(report.search or ()), "multiply-adds, share of dense"
    return Markup(plot(series, title="Search", x_label=label, y_label="divergence, nats", log_y=True))


def _fronts(entries: Sequence[Entry]) -> list[Markup]:
    """Accuracy (where it was measured) or else nothing to gain: against multiply-adds, and against throughput."""
    judged = [(entry.name, entry.report, entry.report.accuracy) for entry in entries]
    known = [(name, report, accuracy) for name, report, accuracy in judged if accuracy is not None]
    if not known:
        return []

    def front(title: str, label: str, costs: Sequence[tuple[float, float]]) -> Markup:
        """`costs` has those of the dense and of the pruned model, for each of `known`."""
        series = []
        for (name, _, accuracy), (_, cost) in zip(known, costs, strict=True):
            low, high = accuracy.interval
            series.append(Series(name, [(cost, 100 * accuracy.top1)], [(100 * low, 100 * high)]))
        dense = {
            (cost, 100 * accuracy.dense.top1, accuracy.dense.interval)
            for (_, _, accuracy), (cost, _) in zip(known, costs, strict=True)
        }
        ends = [(100 * low, 100 * high) for _, _, (low, high) in sorted(dense)]
        series.append(Series("dense", [(cost, top1) for cost, top1, _ in sorted(dense)], ends, line=False))
        return Markup(plot(series, title=title, x_label=label, y_label="top-1, % (95 %)"))

    fronts = [
        front(
            "Accuracy against multiply-adds",
            "multiply-adds, all directions, G",
            [
                (
                    report.dense.multiply_adds_all_directions / 1e9,
                    (report.pruned or report.dense).multiply_adds_all_directions / 1e9,
                )
                for _, report, _ in known
            ],
        )
    ]
    speeds = [report.speed for _, report, _ in known]
    measured = [(speed.dense.images_per_second, speed.pruned.images_per_second) for speed in speeds if speed]
    if len(measured) == len(known):
        fronts.append(front("Accuracy against speed", "images per second", measured))
    return fronts
