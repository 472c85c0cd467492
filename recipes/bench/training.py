"""Peak memory and images per second of a training step, dense and pruned: the training table of BENCHMARKS.md.

    python recipes/bench/training.py [--variant vim_tiny] [--image-size 224] [--batch-size 8] [--rounds 5]

prints a Markdown table for random weights: forward, loss, gradient and AdamW, without reading images. Models take turns
in every round; speed is the median with quartiles. Peak memory is of the tensors alive at once (on a GPU the
allocator's peak), weights, gradients and the optimiser's moments included.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

import ssmprune_cli
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.models.block import set_recompute
from ssmprune_cli.pruning import compress
from ssmprune_cli.recipe_sections import Training
from ssmprune_cli.workflows.finetune.optimiser import optimiser
from ssmprune_cli.workflows.memory import peak_memory_of

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

    def state(self) -> list[Tensor]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self.model.parameters(), *self.model.buffers(), self.images, *moments]
        return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="vim_tiny")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size).to(arguments.device)
    steps = {}
    for title, (keep, reduction, recompute) in WAYS.items():
        model = variant(arguments.variant, arguments.image_size).to(arguments.device)
        if keep is not None:
            compress(model, keep, reduction=reduction)
        set_recompute(model, recompute)
        steps[title] = Step(model, images)
        seconds(steps[title])  # makes the moments, and warms up
    memory = {title: peak_memory_of(step, step.state()) for title, step in steps.items()}
    times: dict[str, list[float]] = {title: [] for title in steps}
    for _ in range(arguments.rounds):
        for title, step in steps.items():
            times[title].append(seconds(step))
    print("| training step | images/s (quartiles) | against dense | peak memory, MiB | against dense |")
    print("|---|---|---|---|---|")
    for title, found in times.items():
        rates = sorted(arguments.batch_size / each for each in found)
        low, middle, high = statistics.quantiles(rates, n=4) if len(rates) > 1 else rates * 3
        faster = statistics.median(times["dense"]) / statistics.median(found)
        print(
            f"| {title} | {middle:.2f} ({low:.2f} to {high:.2f}) | {faster:.2f}x | {memory[title] / 2**20:.1f} | "
            f"{memory[title] / memory['dense']:.3f} |"
        )
    print(
        f"\n{arguments.variant}, {arguments.image_size} pixels, batch {arguments.batch_size}, "
        f"{arguments.rounds} rounds, {arguments.device}; ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {platform.machine()}, {torch.get_num_threads()} threads, backend "
        f"{active_backend()}."
    )


if __name__ == "__main__":
    main()
