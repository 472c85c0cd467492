"""The evidence of docs/results.md for one checkpoint, without fine-tuning: ways to prune, and what the search finds.

    python recipes/bench/evidence.py [CKPT --dataset cifar10 --data DIR --calib DIR] [--csv FILE] [--device cuda]
        [--keep 0.9 0.7 0.5] [--flops 0.8 0.6] [--times 0.8 0.6] [--search 0.8 0.6] [--counts 16 64 256]

prints Markdown tables, and with --csv FILE writes each beside it after every row (FILE_keep.csv, ...). Beside them a
.json keeps what is finished: a run that was killed continues with the same command. Without a checkpoint: that of the
demo, on its digits.

--keep    equal keep ratios at the default points: what order, score, context and every alignment do
--flops   every method, cut uniformly at the default points, at equal multiply-adds (shares of the dense model's)
--times   the same at equal measured time (shares of the dense model's)
--search  the schedule that `ssmprune search` finds on --calib, against the uniform default (clip/context/calibrated)
          and the same without alignment, on --data, which the search has not seen: paired differences
--counts  the search at --counts-budget with so many calibration images

"nats" is the mean divergence KL(dense || pruned) of the class probabilities. ± is one standard error over images; with
random scores, of which three seeds are averaged, over seeds too.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import calibration_images, open_dataset
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.pruning import ALIGNMENTS, IMPORTANCES, REDUCTIONS, PruneSettings, choose_alignment, restore
from ssmprune_cli.pruning.divergence import divergence, paired
from ssmprune_cli.pruning.method import Method, known_methods
from ssmprune_cli.recipe.sections import CalibrationPlan
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.compress import recipe_settings
from ssmprune_cli.workflows.measure.machine import machine
from ssmprune_cli.workflows.search import Limits
from ssmprune_cli.workflows.search.workflow import SearchPlan, search
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials.budgets import Budget, Uniform
from ssmprune_cli.workflows.trials.measure import Images, load_images
from ssmprune_cli.workflows.trials.state import SavedState
from tables import Tables

DEMO = Path(__file__).parent.parent / "demo"
SEEDS = 3
CALIBRATION = 64
DEFAULT = Method("clip", "context", "calibrated")
AT_EQUAL_KEEP = {
    "random drop": Method("random", "drop", "none"),
    "unsorted drop": Method("clip", "drop-unsorted", "none"),
    "order-preserving drop": Method("clip", "drop", "none"),
    "aligned, neighbour": Method("clip", "drop", "neighbour"),
    "aligned, null": Method("clip", "drop", "null"),
    "aligned, calibrated": Method("clip", "drop", "calibrated"),
    "random drop with context": Method("random", "context", "none"),
    "drop with context": Method("clip", "context", "none"),
    "drop with context, aligned, calibrated": Method("clip", "context", "calibrated"),
    "mask (saves nothing)": Method("clip", "mask", "none"),
}
METHOD_TITLES = ("method", "multiply-adds", "images/s", "top-1 %", "change, points", "nats")
SEARCH_TITLES = (
    "budget",
    "calibration images",
    "searched recipe",
    "prune after",
    "patch tokens left",
    "multiply-adds, searched and default",
    "top-1 %: dense, searched, default",
    "nats, searched",
    "nats, default",
    "searched less default",
    "searched less default without alignment",
)


def at_equal_cost() -> dict[str, Method]:
    """Every reduction with the paper's score, without alignment and with its usual one; every score with two."""
    found = [
        Method("clip", reduction, alignment)
        for reduction in REDUCTIONS.names()
        if REDUCTIONS.get(reduction).shortens
        for alignment in ("none", choose_alignment("auto", reduction, calibrated=True))
    ]
    found += [Method(score, reduction, "none") for reduction in ("drop", "context") for score in IMPORTANCES.names()]
    found.append(Method("random", "pool", "mass"))
    return {str(method): method for method in found}


class Evidence:
    """The tables for one checkpoint. `--limit` images are evaluated on; every result is kept as soon as it is known."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.source = Source(arguments.checkpoint)
        self.out: Path | None = arguments.csv
        self.tables = Tables(self.out)
        dataset = open_dataset(arguments.dataset, arguments.data)
        identity = {
            "checkpoint": checkpoint.sha256(arguments.checkpoint),
            **{key: str(getattr(arguments, key)) for key in ("data", "calib", "limit", "device", "batch_size")},
            **{key: getattr(arguments, key) for key in ("evaluations", "time_limit", "rounds")},
        }
        self.state = SavedState(self.out.with_suffix(".json") if self.out else None, identity)
        self.comparison = Comparison(
            self.source,
            dataset,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
            device=arguments.device,
            rounds=arguments.rounds,
        )
        self.calibration = self._calibration(CALIBRATION)
        self.uniform = Uniform(self.comparison.model, self.calibration, batch_size=arguments.batch_size)

    def methods(self, kind: Literal["keep", "flops", "time"], values: list[float], methods: dict[str, Method]) -> None:
        """A table of `methods` at every budget of this kind."""
        if not values:
            return
        self.tables.start(kind, "keep" if kind == "keep" else "budget", *METHOD_TITLES)
        if self.comparison.judged:
            right = self._right(self.comparison.dense_answers.sample)
            self.tables.row("", "dense", "1.0000", "", plus_minus(100 * right, 2), "", "")
        for value in values:
            for title, method in methods.items():
                if kind != "keep" and not REDUCTIONS.get(method.reduction).shortens:
                    continue
                row = self.state.get(f"{kind} {value} {method}", partial(self._row, method, Budget(kind, value)))
                cells = row or ["cannot save enough at these points", "", "", "", ""]
                self.tables.row(f"{value:g}", title, *cells)

    def searches(self, kind: str, budgets: list[float], counts: list[int]) -> None:
        """A table of what searches find, against the uniform default."""
        if not budgets or not counts:
            return
        self.tables.start(kind, *SEARCH_TITLES)
        for count in counts:
            for budget in budgets:
                cells = self.state.get(f"search {budget} {count}", partial(self._search, budget, count))
                self.tables.row(f"{budget:g}", str(count), *cells)
            if (state := self._search_state(count)) is not None:
                state.unlink(missing_ok=True)

    def _search_state(self, count: int) -> Path | None:
        return self.out.with_suffix(f".search{count}.json") if self.out else None

    def _row(self, method: Method, budget: Budget) -> list[str] | None:
        settings = self.uniform.settings(method, budget)
        if settings is None:
            return None
        seeds = range(SEEDS if method.importance == "random" else 1)
        found = [self._logits(replace(settings, seed=seed)) for seed in seeds]
        self.comparison.prune(settings, self._needed(settings, self.calibration))
        cost = self.comparison.cost() / self.comparison.dense_cost
        speed, faster = self.comparison.speed()
        restore(self.comparison.model)
        nats = torch.stack([divergence(self.comparison.dense_answers.sample, logits) for logits in found])
        cells = [f"{cost:.4f}", f"{speed:.0f} ({faster:.2f}x)", "", "", plus_minus(nats)]
        if self.comparison.judged:
            right = 100 * torch.stack([self._right(logits) for logits in found])
            change = right - 100 * self._right(self.comparison.dense_answers.sample)
            cells[2:4] = plus_minus(right, 2), plus_minus(change, 2, "+")
        return cells

    def _search(self, budget: float, count: int) -> list[str]:
        arguments = self.arguments
        plan = SearchPlan(
            calib=arguments.calib,
            methods=list(known_methods()),
            budgets=(Budget("flops", budget),),
            calibration=CalibrationPlan(images=count, batch_size=arguments.batch_size),
            limits=Limits(arguments.evaluations, arguments.time_limit),
            device=arguments.device,
            state=self._search_state(count),
        )
        print(f"searching at {budget:g} on {count} images", file=sys.stderr, flush=True)
        (result,) = search(self.source, plan).found
        calibration = self._calibration(count)
        found = recipe_settings(self.comparison.model, result.recipe, calibrated=arguments.calib is not None)
        assert found is not None, "a search drops tokens"
        pair = (DEFAULT, replace(DEFAULT, alignment="none"))
        default, plain = (self.uniform.settings(method, Budget("flops", budget)) for method in pair)
        assert default is not None and plain is not None, "the default reduction cannot save so much"
        logits = [self._logits(settings, calibration) for settings in (found, default, plain)]
        nats = [divergence(self.comparison.dense_answers.sample, each) for each in logits]
        right = ["" for _ in range(3)]
        if self.comparison.judged:
            shown = [self.comparison.dense_answers.sample, *logits[:2]]
            right = [f"{100 * float(self._right(each).mean()):.2f}" for each in shown]
        costs = [self._cost(settings) for settings in (found, default)]
        return [
            f"{found.importance}/{found.reduction}/{found.alignment}",
            ", ".join(map(str, found.schedule.points)),
            ", ".join(map(str, found.schedule.tokens)),
            ", ".join(f"{cost:.4f}" for cost in costs),
            ", ".join(right),
            plus_minus(nats[0]),
            plus_minus(nats[1]),
            *("{:+.4f} ± {:.4f}".format(*paired(nats[0], other)) for other in nats[1:]),
        ]

    def _calibration(self, count: int) -> Images:
        return load_images(self.comparison.model, calibration_images(self.arguments.calib, count, 0))

    def _needed(self, settings: PruneSettings, calibration: Images) -> Images | None:
        alignment = ALIGNMENTS.get(settings.alignment)
        return calibration if alignment.needs_calibration or alignment.needs_sizes else None

    def _logits(self, settings: PruneSettings, calibration: Images | None = None) -> Tensor:
        given = self.calibration if calibration is None else calibration
        self.comparison.prune(settings, self._needed(settings, given))
        answers = self.comparison.answers(f"{settings.importance}/{settings.reduction}/{settings.alignment}")
        restore(self.comparison.model)
        return answers.sample

    def _cost(self, settings: PruneSettings) -> float:
        self.comparison.prune(replace(settings, alignment="none" if settings.alignment == "none" else "null"), None)
        share = self.comparison.cost() / self.comparison.dense_cost
        restore(self.comparison.model)
        return share

    def _right(self, logits: Tensor) -> Tensor:
        """(N,) float64: 1 for a right answer."""
        dataset = self.comparison.images.dataset
        labels = torch.tensor([dataset.target(index) for index in range(len(dataset))])
        return (logits.argmax(dim=1) == labels).double()


def plus_minus(values: Tensor, digits: int = 4, sign: str = "") -> str:
    """Mean and standard error of (N,) values of images, or of (seeds, N): then over both."""
    rows = values.reshape(-1, values.shape[-1])
    over_images = rows.mean(dim=0)
    error = float(over_images.std()) / math.sqrt(len(over_images))
    if len(rows) > 1:
        error = math.hypot(error, statistics.stdev(rows.mean(dim=1).tolist()) / math.sqrt(len(rows)))
    return f"{float(rows.mean()):{sign}.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", default=DEMO / "vim_digits.pth")
    parser.add_argument("--dataset", default="npz", help="layout of --data, as in `ssmprune eval`")
    parser.add_argument("--data", type=Path, default=DEMO / "test.npz", help="images to compare on")
    parser.add_argument("--calib", type=Path, default=DEMO / "calib.npz", help="other images")
    parser.add_argument("--limit", type=int, help="compare on so many images, always the same")
    parser.add_argument("--csv", type=Path, help="write each table beside it; finished rows are kept in the .json")
    shares: Callable[..., object] = partial(parser.add_argument, type=float, nargs="*", default=[])
    for option in ("--keep", "--flops", "--times", "--search"):
        shares(option)
    parser.add_argument("--counts", type=int, nargs="*", default=[], help="calibration images")
    parser.add_argument("--counts-budget", type=float, default=0.6)
    parser.add_argument("--search-images", type=int, default=256, help="calibration images of --search")
    parser.add_argument("--evaluations", type=int, default=150, help="candidates that each search may try")
    parser.add_argument("--time-limit", type=float, help="seconds for each search")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each model")
    arguments = parser.parse_args()
    evidence = Evidence(arguments)
    evidence.methods("keep", arguments.keep, AT_EQUAL_KEEP)
    evidence.methods("flops", arguments.flops, at_equal_cost())
    evidence.methods("time", arguments.times, at_equal_cost())
    evidence.searches("search", arguments.search, [arguments.search_images])
    evidence.searches("counts", [arguments.counts_budget], arguments.counts)
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    evidence.tables.measured_on(
        f"{arguments.checkpoint.name}, {len(evidence.comparison.images)} images; {versions}, "
        f"{machine(evidence.comparison.device)}, {torch.get_num_threads()} threads, "
        f"backend {active_backend(arguments.device)}, batches of {arguments.batch_size}; ± is one standard error."
    )


if __name__ == "__main__":
    main()
