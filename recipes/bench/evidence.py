"""The evidence for the choice of what to prune: methods at equal cost and time, the search against the uniform default.

    python recipes/bench/evidence.py CKPT --data-dir DIR --calib DIR [--dataset imagefolder] [--limit 500]

prints Markdown tables for one checkpoint, no fine-tuning:

1. every method, its tokens cut uniformly, at equal multiply-adds, and with --times at equal measured time;
2. at each budget the schedule that `ssmprune search` finds on --calib against the uniform default (clip/context, the
   default points), on the images of --data-dir, which the search has not seen: the paired difference;
3. the same at the budget --images-budget with 16, 64 and 256 calibration images.

"nats" is the mean divergence KL(dense || pruned). --evaluations and --time-limit bound each search, --limit the images.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli.data import calibration_images, open_dataset
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.pruning import IMPORTANCES, REDUCTIONS, choose_alignment
from ssmprune_cli.pruning.method import Method, known_methods
from ssmprune_cli.recipe_sections import CalibrationPlan
from ssmprune_cli.workflows.compare import Comparison, Row, compare, recipe_settings
from ssmprune_cli.workflows.compress import Source
from ssmprune_cli.workflows.search.algorithm import Limits
from ssmprune_cli.workflows.search.measure import load_images
from ssmprune_cli.workflows.search.workflow import SearchPlan, search
from ssmprune_cli.workflows.uniform import Budget, Uniform


def methods() -> list[Method]:
    """Every reduction with the paper's score and its default alignment, and without; every score with `drop`."""
    found = []
    for reduction in REDUCTIONS.names():
        if REDUCTIONS.get(reduction).shortens:
            found += [Method("clip", reduction, "none")]
            found += [Method("clip", reduction, choose_alignment("auto", reduction, calibrated=True))]
    found += [Method(score, "drop", "none") for score in IMPORTANCES.names()]
    return list(dict.fromkeys(found))


def plus_minus(value: float | None, error: float | None) -> str:
    return "-" if value is None else f"{value:.4f} ± {error:.4f}"


def print_rows(rows: list[Row]) -> None:
    print("| budget | method | multiply-adds | images/s | top-1 % (95 %) | divergence, nats |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        low, high = row.top1_interval or (math.nan, math.nan)
        top1 = "-" if row.top1 is None else f"{100 * row.top1:.2f} ({100 * low:.2f} to {100 * high:.2f})"
        print(
            f"| {row.budget} | {row.name} | {row.share:.4f} | {row.images_per_second:.0f} ({row.speedup:.2f}x) | "
            f"{top1} | {plus_minus(row.divergence, row.divergence_se)} |"
        )


def print_search_header() -> None:
    print(
        "| budget | calibration images | found | prune after | multiply-adds, found and uniform | top-1 %, both | ",
        end="",
    )
    print("nats, found | nats, uniform | found less uniform, nats |")
    print("|---|---|---|---|---|---|---|---|---|")


def search_rows(arguments: argparse.Namespace, comparison: Comparison, budgets: list[float], count: int) -> None:
    """Search at `budgets` with `count` calibration images, and compare with the default on the unseen images."""
    plan = SearchPlan(
        calib=arguments.calib,
        methods=list(known_methods()),
        flops=tuple(budgets),
        calibration=CalibrationPlan(images=count, batch_size=arguments.batch_size),
        limits=Limits(arguments.evaluations, arguments.time_limit),
        device=arguments.device,
    )
    results = search(Source(arguments.checkpoint), plan).found
    calibration = load_images(comparison.model, calibration_images(arguments.calib, count, 0))
    uniforms = Uniform(comparison.model, calibration, batch_size=arguments.batch_size)
    default = Method("clip", "context", choose_alignment("auto", "context", calibrated=True))
    for result in results:
        settings = recipe_settings(comparison.model, result.recipe, arguments.calib)
        found, found_nats = comparison.pruned("found", "", settings, calibration)
        uniform = uniforms.settings(default, Budget("flops", result.budget))
        assert uniform is not None, "the default reduction cannot save so much"
        base, base_nats = comparison.pruned("uniform", "", uniform, calibration)
        difference: Tensor = found_nats - base_nats
        error = float(difference.std()) / math.sqrt(len(difference))
        nats = [plus_minus(row.divergence, row.divergence_se) for row in (found, base)]
        top1 = "-" if found.top1 is None or base.top1 is None else f"{100 * found.top1:.2f}, {100 * base.top1:.2f}"
        print(
            f"| {result.budget:g} | {count} | {settings.importance}/{settings.reduction}/{settings.alignment} | "
            f"{', '.join(map(str, settings.schedule.points))} | {found.share:.4f}, {base.share:.4f} | {top1} | "
            f"{nats[0]} | {nats[1]} | "
            f"{float(difference.mean()):+.4f} ± {error:.4f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True, help="images to compare on, not those of --calib")
    parser.add_argument("--dataset", default="imagefolder", help="layout of --data-dir, as in `ssmprune eval`")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=500, help="images to compare on")
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.8, 0.7, 0.6, 0.5])
    parser.add_argument("--times", type=float, nargs="*", default=[], help="shares of the dense model's time")
    parser.add_argument("--counts", type=int, nargs="*", default=[16, 64, 256], help="calibration images to try")
    parser.add_argument("--images-budget", type=float, default=0.6)
    parser.add_argument("--evaluations", type=int, default=120, help="candidates that each search may try")
    parser.add_argument("--time-limit", type=float, help="seconds for each budget's search")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["methods", "search", "images"])
    arguments = parser.parse_args()
    start = time.perf_counter()
    dataset = open_dataset(arguments.dataset, arguments.data_dir)
    source = Source(arguments.checkpoint)
    common = {
        "limit": arguments.limit,
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "device": arguments.device,
    }
    if "methods" not in arguments.skip:
        budgets = [Budget("flops", share) for share in arguments.budgets]
        budgets += [Budget("time", share) for share in arguments.times]
        rows, notes = compare(source, dataset, methods(), budgets, calib=arguments.calib, **common)
        print_rows(rows)
        print("\n" + "\n".join(f"- {note}" for note in notes), flush=True)
    comparison = Comparison(source, dataset, **common)
    if "search" not in arguments.skip:
        print()
        print_search_header()
        search_rows(arguments, comparison, arguments.budgets, 64)
    if "images" not in arguments.skip:
        print()
        print_search_header()
        for count in arguments.counts:
            search_rows(arguments, comparison, [arguments.images_budget], count)
    print(
        f"\n{arguments.checkpoint.name}, {len(comparison.images.pixels)} images; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, {arguments.device}, "
        f"backend {active_backend(arguments.device)}, {time.perf_counter() - start:.0f} s; "
        "± is one standard error."
    )


if __name__ == "__main__":
    main()
