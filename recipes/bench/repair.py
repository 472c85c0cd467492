"""What a repair gives, and a distillation after it: divergence and top-1 before and after, on images not seen.

    python recipes/bench/repair.py CKPT... --data-dir DIR --calib DIR [--dataset imagefolder] [--flops 0.6]
        [--counts 1024] [--distill-steps 200] [--methods clip/drop/calibrated ...] [--limit 1000] [--csv FILE]
        [--device cuda]

prints a Markdown table, and with --csv FILE writes it too. Every method is cut uniformly at the default points to the
same share of the dense multiply-adds; its alignment is calibrated on 64 of the --calib images, and the repair is fitted
to --counts of them. A distillation goes on from there, on the same images. "nats" is the mean divergence
KL(dense || pruned); ± is one standard error of paired differences, repaired (and trained) less not repaired.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli.data import Subset, calibration_images, open_dataset
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.pruning import ALIGNMENT_IMAGES, Method, divergence, paired, repair, restore
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.compress import distil
from ssmprune_cli.workflows.measure import machine
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, Uniform, load_images, run
from tables import Tables

METHODS = ("clip/drop/calibrated", "clip/context/calibrated", "clip/local-merge/mass")
TITLES = (
    "checkpoint",
    "multiply-adds",
    "method",
    "images",
    "repair",
    "top-1 %: dense",
    "pruned",
    "repaired",
    "change, points",
    "nats, pruned",
    "nats, repaired",
    "change, nats",
    "change, %",
    "s",
)


def rows(path: Path, arguments: argparse.Namespace, tables: Tables) -> None:
    """All methods of one checkpoint."""
    source = Source(path)
    comparison = Comparison(
        source,
        open_dataset(arguments.dataset, arguments.data_dir),
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        rounds=1,
    )
    assert comparison.judged, "labelled images are needed"
    model, judged = comparison.model, comparison.images.dataset
    labels = torch.tensor([judged.target(index) for index in range(len(judged))])
    calibration = calibration_images(arguments.calib, max(arguments.counts), 0)
    images = load_images(model, calibration)
    assert isinstance(images, Tensor), "a classifier's images are of one size"
    mixed = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = images[mixed]  # they come class by class
    aligned = images[:ALIGNMENT_IMAGES]
    uniform = Uniform(model, aligned, batch_size=arguments.batch_size)

    def right(logits: Tensor) -> Tensor:
        return 100 * (logits.argmax(dim=1) == labels).double()

    dense, reference = comparison.dense_answers.sample, source.load().to(comparison.device).eval()

    def row(share: float, name: str, count: int, kind: str, before: Tensor, after: Tensor, seconds: float) -> None:
        nats = [divergence(dense, logits) for logits in (before, after)]
        points, change = paired(right(after), right(before)), paired(nats[1], nats[0])
        tables.row(
            path.stem,
            f"{share:.3f}",
            name,
            str(min(count, len(images))),
            kind,
            *(f"{float(right(logits).mean()):.2f}" for logits in (dense, before, after)),
            "{:+.2f} ± {:.2f}".format(*points),
            *(f"{float(each.mean()):.4f}" for each in nats),
            "{:+.4f} ± {:.4f}".format(*change),
            f"{100 * change[0] / max(float(nats[0].mean()), math.ulp(1.0)):+.1f}",
            f"{seconds:.1f}",
        )

    for budget in arguments.flops:
        for name in arguments.methods:
            settings = uniform.settings(Method.parse(name), Budget("flops", budget))
            if settings is None:
                print(f"{path.name}: {name} cannot reach {budget:g}", file=sys.stderr)
                continue
            comparison.prune(settings, aligned)
            share = comparison.cost() / comparison.dense_cost
            before = comparison.answers(name).sample
            for count in arguments.counts:
                found = repair(
                    model,
                    images[:count].split(arguments.batch_size),
                    kind=arguments.kind,
                    runner=comparison.reference.with_pruner,
                )
                after = comparison.answers(f"{name}, repaired").sample
                row(share, name, count, found.kind, before, after, found.seconds)
                for steps in arguments.distill_steps:
                    taught, chosen = copy.deepcopy(model), Subset(calibration, mixed[:count].tolist())
                    answers = run(prepare(reference), images[:count].split(arguments.batch_size))
                    learnt = distil(taught, chosen, reference, steps, dense=answers, kind=found.kind)
                    after = run(prepare(taught), (batch.images for batch in comparison.images))
                    kind = f"{found.kind}, {steps} steps" + ("" if learnt.kept else ", not kept")
                    row(share, name, count, kind, before, after, found.seconds + learnt.seconds)
            restore(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--dataset", default="imagefolder", help="layout of --data-dir, as in `ssmprune eval`")
    parser.add_argument("--data-dir", type=Path, required=True, help="labelled images to judge on")
    parser.add_argument("--calib", type=Path, required=True, help="other images, to fit to")
    parser.add_argument("--limit", type=int, help="judge on so many images, always the same")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.6], help="shares of the dense multiply-adds")
    parser.add_argument("--counts", type=int, nargs="+", default=[1024], help="images that a repair is fitted to")
    parser.add_argument("--distill-steps", type=int, nargs="+", default=[], help="updates of a training after it")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--kind", default="auto", choices=("auto", "head", "head+side"))
    parser.add_argument("--csv", type=Path, help="write the table beside it: FILE_repair.csv")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    tables = Tables(arguments.csv)
    tables.start("repair", *TITLES)
    for path in arguments.checkpoints:
        rows(path, arguments, tables)
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    tables.measured_on(
        f"{versions}, {machine(arguments.device)}, {torch.get_num_threads()} threads, backend "
        f"{active_backend(arguments.device)}; ± is one standard error of paired differences."
    )


if __name__ == "__main__":
    main()
