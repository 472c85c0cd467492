"""Whether the time of pruned models follows their multiply-adds: every reduction, by sessions on this CPU.

    python recipes/bench/reductions.py [--share 0.65] [--rounds 7] [--one-thread] [--csv FILE.csv]

Each reduction keeps as many tokens as leave about this share of the dense model's multiply-adds, at the default prune
points. "Predicted" is the dense session's time times the share. Contestants take turns in one process; a time share is
the median over rounds of the time beside the dense model's in the same round. Weights of Vim-T at 224 x 224 are random:
they do not change the time.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import ssmprune_cli
from ssmprune_cli.cli.allocator import keep_freed_memory
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure.flops import count_flops
from ssmprune_cli.workflows.measure.machine import machine
from tables import Tables

BASELINES = Path(__file__).resolve().parents[2] / "benchmarks"


def _trained(name: str) -> Backbone:
    model = ssmprune_cli.load(BASELINES / name)
    assert isinstance(model, Backbone)
    return model.eval()


MODELS: dict[str, Callable[[], Backbone]] = {
    "Vim-T": lambda: Vim(VimConfig()).eval(),
    "Vim CIFAR-10": partial(_trained, "vim_cifar10.pth"),
    "Vim-T CIFAR-10": partial(_trained, "vim_tiny_cifar10.pth"),
}
REDUCTIONS = (
    "drop",
    "context",
    "local-merge",
    "pool",
    "frozen",
    "frozen-once",
    "frozen-near",
    "frozen-pairs",
    "merge",
    "hybrid",
    "keep-target-source",
    "fuse",
)
TURN = 0.03  # seconds that a contestant runs at a time, at least
KEEPS = (0.05, 1.0)  # ratios between which the one is sought that leaves the share


def share_of(model: Backbone, reduction: str, keep: float, dense: int) -> float:
    """Prune `model` so; its share of `dense` multiply-adds."""
    compress(model, keep, reduction=reduction)
    return count_flops(model).all_directions / dense


def prune_to(model: Backbone, reduction: str, share: float, dense: int) -> tuple[float, float]:
    """Prune `model` to about `share` of `dense` multiply-adds, or as near as it gets: keep ratio and true share."""
    low, high = KEEPS
    keep = 0.7
    for _ in range(5):
        found = share_of(model, reduction, keep, dense)
        if abs(found - share) < 0.01:
            break
        low, high = (low, keep) if found > share else (keep, high)
        keep = (low + high) / 2
    return keep, share_of(model, reduction, keep, dense)


def race(contestants: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float]) -> list[list[float]]:
    """Milliseconds of a run of each contestant in every round. In a round each runs once before it is timed, as the one
    before it has emptied the caches, and then as often as fills TURN."""
    counts = []
    for run in contestants:
        run()
        start = clock()
        run()
        counts.append(math.ceil(TURN / (clock() - start)))
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for run, count, found in zip(contestants, counts, times, strict=True):
            if count > 1:
                run()
            start = clock()
            for _ in range(count):
                run()
            found.append(1e3 * (clock() - start) / count)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--reductions", nargs="+", choices=REDUCTIONS, default=list(REDUCTIONS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--share", type=float, default=0.65, help="of the dense model's multiply-adds")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--one-thread",
        action="store_true",
        help="one thread and its processor time, for a machine that does other work",
    )
    parser.add_argument("--csv", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    keep_freed_memory()
    clock = time.process_time if arguments.one_thread else time.perf_counter
    if arguments.one_thread:
        torch.set_num_threads(1)
    tables = Tables(arguments.csv)
    titles = ("multiply-adds", "dense, ms", "ms a batch", "of dense time", "of predicted")
    tables.start("", "model", "batch", "reduction", "keep", *titles)
    for name in arguments.models:
        dense = MODELS[name]()
        work = count_flops(dense).all_directions
        pruned = {reduction: MODELS[name]() for reduction in arguments.reductions}
        shares = {each: prune_to(model, each, arguments.share, work) for each, model in pruned.items()}
        sessions = [prepare(model) for model in (dense, *pruned.values())]
        for batch in arguments.batches:
            images = torch.randn(batch, 3, *dense.image_size, generator=torch.Generator().manual_seed(0))
            first, *others = race([partial(session, images) for session in sessions], arguments.rounds, clock)
            for (reduction, (keep, share)), times in zip(shares.items(), others, strict=True):
                ratio = statistics.median(own / base for own, base in zip(times, first, strict=True))
                figures = (f"{statistics.median(first):.2f}", f"{statistics.median(times):.2f}")
                against = (f"{ratio:.3f}", f"{ratio / share:.2f}x")
                tables.row(name, str(batch), reduction, f"{keep:.3f}", f"{share:.3f}", *figures, *against)
    tables.measured_on(
        f"{machine()}, {torch.get_num_threads()} threads; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; medians of {arguments.rounds} rounds"
        f"{' of processor time' if arguments.one_thread else ''}."
    )


if __name__ == "__main__":
    main()
