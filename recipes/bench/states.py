"""Scans of language models on this CPU: what an update of a state costs by their number, and Mamba-2's scan.

    python recipes/bench/states.py [--seconds 3] [--csv benchmarks/results/states.csv]

prints Markdown tables, and with --csv writes each to a file beside it (states_size.csv, states_ssd.csv). How it is
timed is in speed.py. Weights and inputs are random, with step sizes and rates as trained models have them.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from speed import Contestants, cell, race
from ssmprune_cli.cli.allocator import keep_freed_memory
from ssmprune_cli.kernels import active_backend, selective_scan, ssd_flops, ssd_scan
from ssmprune_cli.workflows.measure.machine import machine
from tables import Tables

LENGTH, CHANNELS, SIZES = 1024, 768, (1, 16, 64, 128, 256)
HEADS, WIDTH = 24, 64  # of mamba2-130m
SSD_SHAPES = ((256, 64), (256, 128), (1024, 64), (1024, 128), (4096, 128))  # tokens and states


def size_table(tables: Tables, seconds: float) -> None:
    """Updates a second by the number of states; 16 is that of Mamba's published models."""
    tables.start("size", "states", "ms", "G updates/s")
    contestants: Contestants = {}
    for state in SIZES:
        u, delta = torch.randn(1, LENGTH, CHANNELS), torch.randn(1, LENGTH, CHANNELS) - 3
        narrow = [torch.randn(1, LENGTH, state) for _ in range(2)]
        rates = -torch.arange(1.0, state + 1).expand(CHANNELS, -1).contiguous()
        contestants[str(state)] = partial(selective_scan, u, delta, rates, *narrow)
    for state, times in zip(SIZES, race(contestants, seconds).values(), strict=True):
        rate = LENGTH * CHANNELS * state / statistics.median(times) / 1e6
        tables.row(str(state), cell(times), f"{rate:.2f}")


def repeated(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Mamba-2's scan as one of Mamba-1, whose channels repeat what their heads have."""
    width, state = x.shape[3], B.shape[3]
    delta, rates, skip = (each.repeat_interleave(width, dim=-1) for each in (dt, A, D))
    return selective_scan(x.flatten(2), delta, rates[:, None].expand(-1, state), B[:, :, 0], C[:, :, 0], skip)


def ssd_table(tables: Tables, seconds: float) -> None:
    tables.start("ssd", "tokens, states", "ssd_scan, ms", "selective_scan, ms", "times as fast", "GMAC/s")
    for length, state in SSD_SHAPES:
        x, dt = torch.randn(1, length, HEADS, WIDTH), torch.randn(1, length, HEADS) - 3
        narrow = [torch.randn(1, length, 1, state) for _ in range(2)]
        inputs = (x, dt, -1 - 15 * torch.rand(HEADS), *narrow, torch.ones(HEADS))
        contestants: Contestants = {"ssd": partial(ssd_scan, *inputs), "repeated": partial(repeated, *inputs)}
        own, others = race(contestants, seconds).values()
        median = statistics.median(own)
        rate = ssd_flops(1, length, HEADS, WIDTH, 1, state, has_D=True) / median / 1e6
        ratio = f"{statistics.median(others) / median:.2f}"
        tables.row(f"{length}, {state}", cell(own), cell(others), ratio, f"{rate:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each figure")
    parser.add_argument("--csv", type=Path, help="write the tables here too")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    tables = Tables(arguments.csv)
    with torch.inference_mode():
        size_table(tables, arguments.seconds)
        ssd_table(tables, arguments.seconds)
    tables.measured_on(
        f"{machine()}, {torch.get_num_threads()} threads, backend {active_backend()}; "
        f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}; "
        "median (quartiles)."
    )


if __name__ == "__main__":
    main()
