"""The best model for a time: what a search finds, reductions, a smaller image, fewer blocks, each repaired or not.

    python recipes/bench/equal_time.py CKPT... --data-dir DIR --calib DIR [--dataset imagefolder] [--times 0.7]
        [--batch-sizes 8] [--evaluations 40] [--limit 1000] [--csv FILE] [--device cuda]

prints a Markdown table, and with --csv FILE writes it too. Every row takes the same share of the dense session's time,
by the table that searches plan with; "time" is what was measured then, in turn with the dense model, with quartiles.
"searched" is what `compress --target-latency-ratio` returns. "nats" is the mean divergence KL(dense || pruned) on
images that had no part in any choice; ± is one standard error, for top-1 of the difference from the dense model.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli.data import calibration_images, open_dataset
from ssmprune_cli.errors import BudgetError
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import Backbone, Size, cuts, sides, smaller
from ssmprune_cli.pruning import ALIGNMENT_IMAGES, Method, divergence, known_methods, paired, prune, repair, restore
from ssmprune_cli.recipe import CalibrationPlan
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.compress import made_smaller, recipe_settings
from ssmprune_cli.workflows.measure import count_flops, interleaved_speeds, machine, quartiles
from ssmprune_cli.workflows.search import Limits, SearchPlan, search
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, Uniform, load_images, run
from tables import Tables

METHODS = (
    "clip/drop/calibrated",
    "clip/context/calibrated",
    "clip/local-merge/mass",
    "clip/pool/mass",
    "clip/frozen-pairs/mass",
    "clip/grid-merge/mass",
    "random/drop/none",
)
TITLES = (
    "checkpoint",
    "batch",
    "time asked",
    "method",
    "repair",
    "multiply-adds",
    "time",
    "top-1 %",
    "change, points",
    "nats",
    "what",
)


class Bench:
    """All rows of one checkpoint."""

    def __init__(self, path: Path, arguments: argparse.Namespace, tables: Tables) -> None:
        self.path, self.arguments, self.tables = path, arguments, tables
        self.source = Source(path)
        self.comparison = Comparison(
            self.source,
            open_dataset(arguments.dataset, arguments.data_dir),
            limit=arguments.limit,
            batch_size=64,
            device=arguments.device,
            rounds=arguments.rounds,
        )
        assert self.comparison.judged, "labelled images are needed"
        judged = self.comparison.images.dataset
        self.labels = torch.tensor([judged.target(index) for index in range(len(judged))])
        self.calibration = calibration_images(arguments.calib, 1024, 0)
        # What the dense model says of them: every repair is fitted to it.
        self.wanted = run(self.comparison.reference, self.images(self.comparison.model).split(64))

    def images(self, model: Backbone) -> Tensor:
        """For calibration, (N, 3, H, W)."""
        images = load_images(model, self.calibration)
        assert isinstance(images, Tensor), "a classifier's images are of one size"
        return images

    def run(self, share: float, batch_size: int) -> None:
        model, budget = self.comparison.model, Budget("time", share)
        images = self.images(model)
        mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        uniform = Uniform(model, images[mixed[:ALIGNMENT_IMAGES]], batch_size=batch_size)
        for name in self.arguments.methods:
            settings = uniform.settings(Method.parse(name), budget)
            if settings is None:
                print(f"{self.path.name}: {name} cannot reach {share:g} of the time", file=sys.stderr)
                continue
            self.comparison.prune(settings, images[mixed[:ALIGNMENT_IMAGES]])
            what = f"{settings.schedule.points} {settings.schedule.tokens}"
            self.rows(model, self.comparison.reference, images, share, batch_size, name, what)
            restore(model)
        for name, sizes in (
            ("smaller image", [Size(side) for side in sides(model)]),
            ("cut short", [Size(cut=blocks) for blocks in cuts(model)]),
        ):
            self.comparison.batch_size = batch_size
            size = self.comparison.size_for(sizes, budget, 0)
            self.comparison.batch_size = 64
            if size is not None:
                small = smaller(model, size)
                self.rows(small, prepare(small), self.images(small), share, batch_size, name, str(size))
        self.searched(share, batch_size)

    def searched(self, share: float, batch_size: int) -> None:
        plan = SearchPlan(
            calib=self.arguments.calib,
            methods=list(known_methods()),
            budgets=(Budget("time", share),),
            repair="auto",
            batch_size=batch_size,
            calibration=CalibrationPlan(images=256),
            limits=Limits(self.arguments.evaluations),
            device=self.arguments.device,
        )
        try:
            (found,) = search(self.source, plan).found
        except BudgetError as error:
            print(f"{self.path.name}: a search cannot reach {share:g} of the time: {error}", file=sys.stderr)
            return
        model = made_smaller(self.source.load(), found.recipe).to(self.comparison.device).eval()
        settings = recipe_settings(model, found.recipe, calibrated=True)
        images = self.images(model)
        what = found.trace()[0].recipe
        if settings is not None:
            prune(model, settings, images, dense=self.wanted)
        self.rows(model, prepare(model), images, share, batch_size, "searched", what)

    def rows(
        self,
        model: Backbone,
        session: Session,
        images: Tensor,
        share: float,
        batch_size: int,
        name: str,
        what: str,
    ) -> None:
        """Of a model that drops tokens or sees smaller images, as it is and repaired."""
        self.row(session.with_pruner(model.pruner), model, share, batch_size, name, "none", what)
        done = repair(model, images.split(64), runner=session.with_pruner, dense=self.wanted)
        if done.kind != "none":
            repaired = prepare(model) if model.pruner is None else session.with_pruner(model.pruner)
            self.row(repaired, model, share, batch_size, name, done.kind, what)

    def row(
        self, session: Session, model: Backbone, share: float, batch_size: int, name: str, repaired: str, what: str
    ) -> None:
        comparison = self.comparison
        resized = model.config.resized_from is not None
        seen = comparison.at(Size(model.image_size[0])).images if resized else comparison.images
        logits, dense = run(session, (batch.images for batch in seen)), comparison.dense_answers.sample
        nats = divergence(dense, logits)
        right, wanted = (100 * (each.argmax(dim=1) == self.labels).double() for each in (logits, dense))
        change = paired(right, wanted)
        batches = [torch.zeros(batch_size, 3, *each.image_size) for each in (comparison.model, model)]
        both = interleaved_speeds(
            [comparison.reference, session], [each.to(comparison.device) for each in batches], self.arguments.rounds
        )
        ratios = [own / base for base, own in zip(both[0].rounds_ms, both[1].rounds_ms, strict=True)]
        low, high = quartiles(ratios)
        self.tables.row(
            self.path.stem,
            str(batch_size),
            f"{share:g}",
            name,
            repaired,
            f"{count_flops(model).all_directions / comparison.dense_cost:.3f}",
            f"{statistics.median(ratios):.3f} ({low:.3f} to {high:.3f})",
            f"{float(right.mean()):.2f}",
            "{:+.2f} ± {:.2f}".format(*change),
            f"{float(nats.mean()):.4f} ± {float(nats.std()) / len(nats) ** 0.5:.4f}",
            what,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--dataset", default="imagefolder", help="layout of --data-dir, as in `ssmprune eval`")
    parser.add_argument("--data-dir", type=Path, required=True, help="labelled images to judge on")
    parser.add_argument("--calib", type=Path, required=True, help="other images, to choose and to fit by")
    parser.add_argument("--limit", type=int, help="judge on so many images, always the same")
    parser.add_argument("--times", type=float, nargs="+", default=[0.7], help="shares of the dense time")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--evaluations", type=int, default=40, help="of the search")
    parser.add_argument("--rounds", type=int, default=11, help="timed turns of a row")
    parser.add_argument("--csv", type=Path, help="write the table beside it: FILE_equal_time.csv")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    arguments = parser.parse_args()
    tables = Tables(arguments.csv)
    tables.start("equal_time", *TITLES)
    for path in arguments.checkpoints:
        bench = Bench(path, arguments, tables)
        for batch_size in arguments.batch_sizes:
            for share in arguments.times:
                bench.run(share, batch_size)
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    tables.measured_on(
        f"{versions}, {machine(arguments.device)}, {torch.get_num_threads()} threads, backend "
        f"{active_backend(arguments.device)}; time with quartiles; ± is one standard error."
    )


if __name__ == "__main__":
    main()
