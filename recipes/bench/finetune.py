"""The fine-tuning tables of docs/results.md: checkpoints pruned to parts of their multiply-adds, before and after.

    python recipes/bench/finetune.py --checkpoint FILE [FILE ...] --dataset cifar10 --train DIR --val DIR --calib DIR
        [--costs 0.7 0.5] [--points 3 6 9] [--reductions drop context] [--alignments none calibrated]
        [--distilled no yes] [--epochs 3] [--limit N] [--seeds 1] [--set training.key=value ...] [--csv FILE]

prints a Markdown table, a row as soon as it is known, and with --csv writes it. Every checkpoint is pruned (equal
keep ratios at the points) to each share of the dense multiply-adds, all scan directions counted, with the reductions
`drop` and `context`, aligned and not, and trained with and without distillation from the dense model, once for each
seed. "won back" is the share of the lost points that training returned. Top-1 is on the same images for all; ± is the
standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import batches, calibration_images, open_dataset
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe.recipe import Recipe
from ssmprune_cli.recipe.sections import Pruning, Training
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.finetune import Data, Job, finetune
from ssmprune_cli.workflows.finetune.plan import some
from ssmprune_cli.workflows.measure.flops import count_flops
from tables import Tables

DEMO = Path(__file__).parent.parent / "demo"


def keep_ratio(model: Backbone, reduction: str, cost: float, points: list[int] | None) -> float | None:
    """The largest keep ratio (to 1/1000) with which `model` needs at most `cost` of its dense multiply-adds, if any."""
    model.pruner = None
    dense = count_flops(model).all_directions
    low, high = 1, 1000
    while low < high:
        middle = (low + high + 1) // 2
        compress(model, middle / 1000, points=points, reduction=reduction, alignment="none")
        within = count_flops(model).all_directions <= cost * dense
        low, high = (middle, high) if within else (low, middle - 1)
    compress(model, low / 1000, points=points, reduction=reduction, alignment="none")
    found = count_flops(model).all_directions
    model.pruner = None
    return low / 1000 if found <= cost * dense else None


def top1(model: Backbone, images: ImageDataset, device: str) -> float:
    return 100 * float(evaluate(model, images, device=device).score.top1)


def rows(arguments: argparse.Namespace, settings: Training) -> Iterator[dict[str, Any]]:
    validation = some(open_dataset(arguments.dataset, arguments.val), arguments.val_limit, 0)
    everything = open_dataset(arguments.dataset, arguments.train, split="train")
    for path in arguments.checkpoint:
        dense_model = checkpoint.load(path)
        dense = top1(dense_model, validation, arguments.device)
        calibration = [
            batch.images for batch in batches(calibration_images(arguments.calib, 64, 0), dense_model.preprocessing, 64)
        ]
        for cost in arguments.costs:
            for reduction in arguments.reductions:
                keep = keep_ratio(checkpoint.load(path), reduction, cost, arguments.points)
                if keep is None:
                    print(f"  {path.name}: no keep ratio of {reduction} reaches {cost}", file=sys.stderr)
                    continue
                for alignment in arguments.alignments:
                    for distilled in (each == "yes" for each in arguments.distilled):
                        before, after = 0.0, []
                        for seed in range(arguments.seeds):
                            model = checkpoint.load(path)
                            given = calibration if alignment == "calibrated" else None
                            compress(
                                model,
                                keep,
                                points=arguments.points,
                                reduction=reduction,
                                alignment=alignment,
                                calibration=given,
                                repair="none",
                            )
                            before = top1(model, validation, arguments.device)
                            teacher = checkpoint.load(path) if distilled else None
                            job = Job(settings, seed, " ".join(sys.argv), arguments.device, teacher)
                            data = Data(some(everything, arguments.limit, seed))
                            with tempfile.TemporaryDirectory() as folder:
                                result = finetune(model, data, job, Path(folder) / "out")
                                if result.interrupted or result.last is None:
                                    raise SystemExit("interrupted")
                                after.append(top1(checkpoint.load(result.last), validation, arguments.device))
                        mean = statistics.mean(after)
                        row = {
                            "checkpoint": path.name,
                            "cost": cost,
                            "keep": keep,
                            "reduction": reduction,
                            "alignment": alignment,
                            "distilled": distilled,
                            "dense": dense,
                            "before": before,
                            "after": after,
                            "won_back": (mean - before) / (dense - before) if dense > before else None,
                        }
                        yield row


def cells(row: dict[str, Any]) -> list[str]:
    spread = f" ± {statistics.stdev(row['after']):.2f}" if len(row["after"]) > 1 else ""
    won = "-" if row["won_back"] is None else f"{100 * row['won_back']:.0f} %"
    return [
        row["checkpoint"],
        f"{row['cost']} ({row['keep']})",
        row["reduction"],
        row["alignment"],
        "yes" if row["distilled"] else "no",
        f"{row['dense']:.2f}",
        f"{row['before']:.2f}",
        f"{statistics.mean(row['after']):.2f}{spread}",
        won,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, nargs="+", default=[DEMO / "vim_digits.pth"])
    parser.add_argument("--dataset", default="npz", help="layout of --train and --val, as in `ssmprune eval`")
    parser.add_argument("--train", type=Path, default=DEMO / "train.npz")
    parser.add_argument("--val", type=Path, default=DEMO / "test.npz")
    parser.add_argument("--calib", type=Path, default=DEMO / "calib.npz")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.7, 0.5], help="of the dense multiply-adds")
    parser.add_argument("--points", type=int, nargs="+", help="prune after so many blocks (default: as in compress)")
    parser.add_argument("--reductions", nargs="+", default=["drop", "context"])
    parser.add_argument("--alignments", nargs="+", default=["none", "calibrated"], choices=["none", "calibrated"])
    parser.add_argument("--distilled", nargs="+", default=["no", "yes"], choices=["no", "yes"])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="train on so many images")
    parser.add_argument("--val-limit", type=int, help="measure on so many images")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", dest="settings", action="append", default=[], help="training.key=value")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    settings = Recipe(pruning=Pruning(keep=1.0), training=Training(epochs=arguments.epochs)).override(
        arguments.settings
    )
    assert settings.training is not None
    start = time.perf_counter()
    tables = Tables(arguments.csv)
    titles = ("checkpoint", "multiply-adds (keep)", "reduction", "alignment", "distilled")
    tables.start("", *titles, "dense %", "before %", "after %", "won back")
    for row in rows(arguments, settings.training):
        tables.row(*cells(row))
    tables.measured_on(
        f"{arguments.epochs} epochs, {arguments.limit or 'all'} training images, {arguments.seeds} seeds; ssmprune "
        f"{ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {torch.get_num_threads()} threads, backend {active_backend(arguments.device)}, "
        f"{time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
