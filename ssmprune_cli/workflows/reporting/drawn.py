"""The plots of a page. The page writes their titles and legends, so that both wrap on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ssmprune_cli.report import Report
from ssmprune_cli.tasks import TASKS, Estimate
from ssmprune_cli.workflows.reporting.facts import judged, same_images, same_input
from ssmprune_cli.workflows.reporting.plot import PART, Series, mark, plot
from ssmprune_cli.workflows.reporting.traces import search_label, search_series, sensitivity_series

Point = tuple[float, float]


@dataclass(frozen=True)
class Figure:
    """An SVG, and what its legend says: signs and names."""

    title: str
    svg: Markup
    legend: list[tuple[Markup, str]]


def sensitivity_figure(report: Report) -> Figure:
    series = sensitivity_series(report.sensitivity or ())
    y_label = f"divergence, {TASKS.get(report.task).unit} (95 %)"
    return _figure("Divergence by prune point", series, "pruned after block", y_label)


def search_figure(report: Report) -> Figure:
    series, x_label = search_series(report.search or ()), search_label(report.search or ())
    y_label = f"divergence, {TASKS.get(report.task).unit}"
    return _figure(f"Divergence by {x_label.partition(',')[0]}", series, x_label, y_label, log_y=True)


def front_figures(named: Sequence[tuple[str, Report]]) -> list[Figure]:
    """The metric of those reports that have it, against multiply-adds, and against speed if all of them have that.

    Speed is over the dense model's, which was timed in turns with the pruned one, so that a busy hour does not count;
    for models made from different files, which have no dense model in common, it is images per second. Reports of
    different tasks, or judged on different images, have no front in common.
    """
    known = [(name, report, found) for name, report in named if (found := judged(report)) is not None]
    reports = [report for _, report, _ in known]
    if not known or len({report.task for report in reports}) > 1 or not same_images(reports):
        return []
    task = TASKS.get(reports[0].task)
    compared = [(name, task.estimate(each.dense), task.estimate(each)) for name, _, each in known]
    costs = [
        (
            report.dense.multiply_adds_all_directions / 1e9,
            (report.pruned or report.dense).multiply_adds_all_directions / 1e9,
        )
        for report in reports
    ]
    quality, y_label = task.quality.capitalize(), f"{task.metric}, % (95 %)"
    front, x_label = _front(compared, costs, less=True), "multiply-adds, all directions, G"
    fronts = [_figure(f"{quality} against multiply-adds", front, x_label, y_label)]
    speeds = [report.speed for report in reports if report.speed is not None]
    if len(speeds) == len(known):
        if same_input(reports):
            x_label, rates = "speed, times the dense model's", [(1.0, 1 / speed.latency_ratio) for speed in speeds]
        else:
            x_label = "images per second"
            rates = [(speed.dense.images_per_second, speed.pruned.images_per_second) for speed in speeds]
        fronts.append(_figure(f"{quality} against speed", _front(compared, rates, less=False), x_label, y_label))
    return fronts


def _front(compared: Sequence[tuple[str, Estimate, Estimate]], costs: Sequence[Point], *, less: bool) -> list[Series]:
    """`compared` has names and the metrics of the dense and the pruned model, `costs` theirs; with `less`, less is
    better."""
    found = {(cost, before) for (_, before, _), (cost, _) in zip(compared, costs, strict=True)}
    dense = sorted(found, key=lambda each: (each[0], each[1].value))
    points = [(cost, 100 * each.value) for cost, each in dense]
    series = [Series("dense", points, [_ends(each) for _, each in dense], line=False)]
    for (name, _, after), (_, cost) in zip(compared, costs, strict=True):
        series.append(Series(name, [(cost, 100 * after.value)], [_ends(after)]))
    best = pareto([point for each in series for point in each.points], less=less)
    return [*series, Series("Pareto front", best, marks=False)]


def _ends(found: Estimate) -> Point:
    """The interval in per cent; of a value without one, the value."""
    low, high = found.interval or (found.value, found.value)
    return 100 * low, 100 * high


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
