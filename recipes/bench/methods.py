"""The accuracy table of BENCHMARKS.md: every way to drop tokens at equal keep ratios, one checkpoint, no fine-tuning.

    python recipes/bench/methods.py [--checkpoint FILE] [--dataset npz] [--images FILE] [--calib FILE] [--json FILE]

prints a Markdown table. "nats" is the mean divergence KL(dense || pruned) of the class probabilities; standard errors
are over images (for `random`, seeds and images). Speed is the median of rounds in which dense and pruned take turns.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import batches, calibration_images, open_dataset
from ssmprune_cli.data.datasets import Subset
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.pruning import compress, restore
from ssmprune_cli.workflows.profile import profile
from ssmprune_cli.workflows.search.measure import load_images

DEMO = Path(__file__).parent.parent / "demo"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
# title -> importance, reduction, alignment
METHODS = {
    "random drop": ("random", "drop", "none"),
    "unsorted drop": ("clip", "drop-unsorted", "none"),
    "order-preserving drop": ("clip", "drop", "none"),
    "aligned, neighbour": ("clip", "drop", "neighbour"),
    "aligned, null": ("clip", "drop", "null"),
    "aligned, calibrated": ("clip", "drop", "calibrated"),
    "random drop with context": ("random", "context", "none"),
    "drop with context": ("clip", "context", "none"),
    "drop with context, aligned, calibrated": ("clip", "context", "calibrated"),
    "mask (saves nothing)": ("clip", "mask", "none"),
}


def logits_of(model: Backbone, images: list[Tensor]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images]).double().cpu()


def standard_error(values: Tensor) -> float:
    return float(values.std(unbiased=True)) / math.sqrt(len(values))


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    model = checkpoint.load(arguments.checkpoint).to(arguments.device)
    dense_model = checkpoint.load(arguments.checkpoint).to(arguments.device)
    dataset = open_dataset(arguments.dataset, arguments.images)
    if arguments.limit and arguments.limit < len(dataset):
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
        dataset = Subset(dataset, order[: arguments.limit].tolist())
    loaded = list(batches(dataset, model.preprocessing, 64))
    images = [batch.images.to(arguments.device) for batch in loaded]
    labels = torch.cat([batch.labels for batch in loaded if batch.labels is not None])
    calibration = [load_images(model, calibration_images(arguments.calib, 64, 0))]
    dense = logits_of(model, images)
    dense_right = (dense.argmax(dim=1) == labels).double()
    yield {
        "keep": 1.0,
        "method": "dense",
        "flops": 1.0,
        "top1": float(dense_right.mean()),
        "top1_se": standard_error(dense_right),
    }
    for keep in KEEPS:
        for title, (importance, reduction, alignment) in METHODS.items():
            if arguments.methods and title not in arguments.methods:
                continue
            faster = 1.0
            seeds = range(arguments.seeds if importance == "random" else 1)
            rights, divergences, cost, speed = [], [], 0.0, 0.0
            for seed in seeds:
                compress(
                    model,
                    keep,
                    importance=importance,
                    reduction=reduction,
                    alignment=alignment,
                    calibration=calibration if alignment == "calibrated" else None,
                    seed=seed,
                )
                logits = logits_of(model, images)
                if seed == 0:
                    before, after = profile([dense_model, model], batch_size=64, rounds=5, device=arguments.device)
                    cost = after.multiply_adds_all_directions / before.multiply_adds_all_directions
                    speed = after.speed.images_per_second
                    faster = before.speed.median_ms / after.speed.median_ms
                restore(model)
                rights.append((logits.argmax(dim=1) == labels).double())
                dense_log, pruned_log = functional.log_softmax(dense, dim=1), functional.log_softmax(logits, dim=1)
                divergences.append((dense_log.exp() * (dense_log - pruned_log)).sum(dim=1))
            # One value an image (the mean over seeds), plus the spread between seeds where there is randomness.
            right, divergence = torch.stack(rights), torch.stack(divergences)
            between = standard_error(right.mean(dim=1)) if len(right) > 1 else 0.0
            yield {
                "keep": keep,
                "method": title,
                "flops": cost,
                "speed": speed,
                "faster": faster,
                "top1": float(right.mean()),
                "top1_se": math.hypot(standard_error(right.mean(dim=0)), between),
                "loss": float((dense_right - right.mean(dim=0)).mean()),
                "loss_se": math.hypot(standard_error(dense_right - right.mean(dim=0)), between),
                "nats": float(divergence.mean()),
                "nats_se": standard_error(divergence.mean(dim=0)),
            }
            print(f"  {keep} {title}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "vim_digits.pth")
    parser.add_argument("--dataset", default="npz", help="layout of --images, as in `ssmprune eval`")
    parser.add_argument("--limit", type=int, help="use so many images, at random")
    parser.add_argument("--images", type=Path, default=DEMO / "test.npz")
    parser.add_argument("--calib", type=Path, default=DEMO / "calib.npz")
    parser.add_argument("--methods", nargs="*", choices=METHODS, help="only these rows, beside the dense model")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    arguments = parser.parse_args()
    start = time.perf_counter()
    table = list(rows(arguments))
    print("| keep | method | multiply-adds | images/s | top-1 % | change against dense, points | divergence, nats |")
    print("|---|---|---|---|---|---|---|")
    for row in table:
        change = f"{-100 * row['loss']:+.2f} ± {100 * row['loss_se']:.2f}" if "loss" in row else ""  # type: ignore[operator]
        nats = f"{row['nats']:.4f} ± {row['nats_se']:.4f}" if "nats" in row else ""
        speed = f"{row['speed']:.0f} ({row['faster']:.2f}x)" if "speed" in row else ""
        print(
            f"| {row['keep']} | {row['method']} | {row['flops']:.3f} | {speed} | "
            f"{100 * row['top1']:.2f} ± {100 * row['top1_se']:.2f} | {change} | {nats} |"  # type: ignore[operator]
        )
    print(
        f"\n{arguments.checkpoint.name}, {arguments.images.name}; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, "
        f"{arguments.device}, "
        f"backend {active_backend(arguments.device)}, {time.perf_counter() - start:.0f} s; ± is one standard error."
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
