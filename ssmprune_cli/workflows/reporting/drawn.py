"""The plots of a page. The page writes their titles and legends, so that both wrap on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ssmprune_cli.report import AccuracyFacts, Report
from ssmprune_cli.workflows.reporting.facts import same_input
from ssmprune_cli.workflows.reporting.plot import PART, Series, mark, plot
from ssmprune_cli.workflows.reporting.traces import search_series, sensitivity_series

Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """An SVG, and what its legend says: signs and names."""

    title: str
    svg: Markup
    legend: list[tuple[Markup, str]]


def sensitivity_figure(report: Report) -> Figure:
    series = sensitivity_series(report.sensitivity or ())
    return _figure("Divergence by prune point", series, "pruned after block", "divergence, nats (95 %)")


def search_figure(report: Report) -> Figure:
    series, x_label = search_series(report.search or ()), "multiply-adds, share of dense"
    return _figure("Divergence by multiply-adds", series, x_label, "divergence, nats", log_y=True)


def front_figures(named: Sequence[tuple[str, Report]]) -> list[Figure]:
    """Accuracy of those reports that have it, against multiply-adds, and against speed if all of them have that.

    Speed is over the dense model's, which was timed in turns with the pruned one, so that a busy hour does not count;
    for models made from different files, which have no dense model in common, it is images per second.
    """
    known = [(name, report, report.accuracy) for name, report in named if report.accuracy is not None]
    if not known:
        return []
    judged = [(name, accuracy) for name, _, accuracy in known]
    costs = [
        (
            report.dense.multiply_adds_all_directions / 1e9,
            (report.pruned or report.dense).multiply_adds_all_directions / 1e9,
        )
        for _, report, _ in known
    ]
    fronts = [_front("Accuracy against multiply-adds", "multiply-adds, all directions, G", judged, costs, less=True)]
    speeds = [report.speed for _, report, _ in known if report.speed is not None]
    if len(speeds) == len(known):
        if same_input([report for _, report, _ in known]):
            label, rates = "speed, times the dense model's", [(1.0, 1 / speed.latency_ratio) for speed in speeds]
        else:
            label = "images per second"
            rates = [(speed.dense.images_per_second, speed.pruned.images_per_second) for speed in speeds]
        fronts.append(_front("Accuracy against speed", label, judged, rates, less=False))
    return fronts


def _front(
    title: str, label: str, judged: Sequence[tuple[str, AccuracyFacts]], costs: Sequence[Point], *, less: bool
) -> Figure:
    """`costs` has those of the dense and of the pruned model; with `less`, less is better."""
    dense = sorted(
        {
            (cost, 100 * accuracy.dense.top1, accuracy.dense.interval)
            for (_, accuracy), (cost, _) in zip(judged, costs, strict=True)
        }
    )
    ends = [(100 * low, 100 * high) for _, _, (low, high) in dense]
    series = [Series("dense", [(cost, top1) for cost, top1, _ in dense], ends, line=False)]
    for (name, accuracy), (_, cost) in zip(judged, costs, strict=True):
        low, high = accuracy.interval
        series.append(Series(name, [(cost, 100 * accuracy.top1)], [(100 * low, 100 * high)]))
    best = pareto([point for each in series for point in each.points], less=less)
    series.append(Series("Pareto front", best, marks=False))
    return _figure(title, series, label, "top-1, % (95 %)")


def pareto(points: Sequence[Point], *, less: bool) -> list[Point]:
    """Those (cost, gain) of `points` that no other one beats in both, by cost from the best; with `less`, less is."""
    front: list[Point] = []
    for cost, gain in sorted(points, key=lambda point: (point[0] if less else -point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front


def _figure(title: str, series: Sequence[Series], x_label: str, y_label: str, *, log_y: bool = False) -> Figure:
    svg = plot(series, title=title, x_label=x_label, y_label=y_label, log_y=log_y, layout=PART)
    return Figure(title, Markup(svg), [(Markup(mark(index, each)), each.name) for index, each in enumerate(series)])
