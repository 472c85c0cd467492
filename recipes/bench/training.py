"""Peak memory and images per second of a training step, dense and pruned: a table of docs/results.md.

    python recipes/bench/training.py [--variant vim_tiny] [--image-size 224] [--batch-size 8] [--rounds 5]
        [--csv benchmarks/results/training.csv]

prints a Markdown table for random weights, and with --csv writes it: forward, loss, gradient and AdamW, without
reading images. Models take turns in every round; speed is the median with quartiles. Peak memory is what two updates
add to a new process that has the model already: gradients, the optimiser's moments, activations (on a GPU the
allocator's peak, weights included).
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import ssmprune_cli
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.common.backbone import Backbone
from ssmprune_cli.models.common.block import set_recompute
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe.sections import Training
from ssmprune_cli.workflows.finetune.optimiser import optimiser
from tables import Tables

# title -> keep (None: dense), reduction, recompute
WAYS: dict[str, tuple[float | None, str, bool]] = {
    "dense": (None, "", False),
    "dense, recomputed": (None, "", True),
    "keep 0.7, drop": (0.7, "drop", False),
    "keep 0.7, context": (0.7, "context", False),
    "keep 0.5, drop": (0.5, "drop", False),
    "keep 0.5, context": (0.5, "context", False),
    "keep 0.5, context, recomputed": (0.5, "context", True),
}


class Step:
    """One update of a model on the same random images."""

    def __init__(self, model: Backbone, images: Tensor) -> None:
        self.model, self.images = model.train(), images
        self.labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        self.optimizer = optimiser(model, Training())

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(self.images), self.labels).backward()
        self.optimizer.step()


def seconds(step: Step) -> float:
    if step.images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if step.images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def variant(name: str, image_size: int) -> Backbone:
    for _, family in FAMILIES.items():
        if name in family.variants:
            return family.build(replace(family.variants[name], image_size=(image_size, image_size)))
    known = [each for _, family in FAMILIES.items() for each in family.variants]
    raise SystemExit(f"unknown variant {name}; known: {', '.join(known)}")


def make_step(arguments: argparse.Namespace, title: str) -> Step:
    keep, reduction, recompute = WAYS[title]
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size).to(arguments.device)
    model = variant(arguments.variant, arguments.image_size).to(arguments.device)
    if keep is not None:
        compress(model, keep, reduction=reduction)
    set_recompute(model.blocks, recompute)
    return Step(model, images)


def peak_bytes(arguments: argparse.Namespace, title: str) -> int:
    """What two updates add to the memory of a new process at most (on a GPU: all that the allocator gave out)."""
    step = make_step(arguments, title)
    if step.images.is_cuda:
        for _ in range(2):
            step()
        return torch.cuda.max_memory_allocated()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):  # the second one with the optimiser's moments
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # Linux counts kibibytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vim_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    memory = {}
    for title in WAYS:  # each in a process of its own: a peak does not go down again
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            memory[title] = pool.submit(peak_bytes, arguments, title).result()
    steps = {title: make_step(arguments, title) for title in WAYS}
    for step in steps.values():
        seconds(step)  # makes the moments, and warms up
    times: dict[str, list[float]] = {title: [] for title in steps}
    for _ in range(arguments.rounds):
        for title, step in steps.items():
            times[title].append(seconds(step))
    tables = Tables(arguments.csv)
    tables.start("", "training step", "images/s", "speed against dense", "peak memory, MiB", "memory against dense")
    for title, found in times.items():
        rates = sorted(arguments.batch_size / each for each in found)
        low, middle, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        faster = statistics.median(times["dense"]) / statistics.median(found)
        tables.row(
            title,
            f"{middle:.2f} ({low:.2f} to {high:.2f})",
            f"{faster:.2f}x",
            f"{memory[title] / 2**20:.1f}",
            f"{memory[title] / memory['dense']:.3f}",
        )
    tables.measured_on(
        f"{arguments.variant}, {arguments.image_size} pixels, batch {arguments.batch_size}, "
        f"{arguments.rounds} rounds, {arguments.device}; ssmprune {ssmprune_cli.__version__}, torch "
        f"{torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, backend {active_backend(arguments.device)}; median (quartiles)."
    )


if __name__ == "__main__":
    main()
