"""Time and memory of a Mamba against the length of a text: a table of docs/results.md.

    python recipes/bench/lengths.py [--lengths 1024,4096,16384,65536] [--depth 4] [--keep 0.5] [--rounds 5]
        [--csv benchmarks/results/lengths.csv]

A few layers as wide as mamba-130m (768) with random weights and a vocabulary of bytes, one window a batch, dense and
with half of the tokens dropped after the first layer. Time is the median with quartiles; the models take turns at each
length. The last rows say how both grow: the exponent p of time ~ tokens^p (1 is linear), and the bytes of peak memory
that one more token takes.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

import ssmprune_cli
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import Backbone
from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.scaling import scaling
from tables import Tables


def model(depth: int, length: int, keep: float | None) -> Backbone:
    torch.manual_seed(0)
    found = Mamba1LM(Mamba1Config(vocab_size=256, embed_dim=768, depth=depth, length=length)).eval()
    if keep is not None:
        compress(found, keep, points=[1], reduction="drop", alignment="null")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384,65536")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    lengths = [int(each) for each in arguments.lengths.split(",")]
    named = {
        "dense": model(arguments.depth, lengths[0], None),
        f"keep {arguments.keep:g}": model(arguments.depth, lengths[0], arguments.keep),
    }
    found = scaling(named, lengths, unit="tokens", device=arguments.device, rounds=arguments.rounds)
    run = Tables(arguments.csv)
    run.measured_on(
        f"{platform.machine()}, {torch.get_num_threads()} threads; ssmprune {ssmprune_cli.__version__}, torch "
        f"{torch.__version__}; backend {active_backend(arguments.device)}; {arguments.depth} layers of width 768"
    )
    titles = [f"{name}: {figure}" for name in named for figure in ("ms", "us a token", "G multiply-adds", "MiB")]
    run.start("", "tokens", *titles)
    for number, length in enumerate(lengths):
        cells = [f"{length:,}"]
        for points in found.points.values():
            point = points[number]
            low, high = point.quartiles_ms
            cells += [f"{point.median_ms:.1f} ({low:.1f} to {high:.1f})", f"{1e3 * point.median_ms / length:.2f}"]
            cells += [f"{point.multiply_adds / 1e9:.2f}", f"{point.peak_memory_bytes / 2**20:.1f}"]
        run.row(*cells)
    run.start("slope", "model", "exponent of time", "KiB a token")
    for name, slope in found.slopes.items():
        run.row(name, f"{slope.exponent:.3f}", f"{slope.bytes_per_token / 1024:.2f}")


if __name__ == "__main__":
    main()
