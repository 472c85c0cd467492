"""Speed on this CPU: the scan backends at published shapes, and Vim-T dense against pruned, end to end.

    python recipes/bench/speed.py [--seconds 5]

prints two Markdown tables. Contestants take turns in one process; figures are medians over rounds, with the quartiles.
A round in which other processes used the processors is run again, at most three times. glibc is told to keep freed
memory, for all contestants alike, as a warm server would. Weights and inputs are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import ssmprune_cli
from ssmprune_cli.kernels import available_backends, selective_scan, use_backend
from ssmprune_cli.models.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress

SHAPES = {"Vim-T b1": (1, 197, 384), "Vim-T b8": (8, 197, 384), "Vim-S b1": (1, 197, 768), "L 4096 b1": (1, 4096, 384)}
STATE = 16
Contestants = dict[str, Callable[[], object]]


def keep_freed_memory() -> None:
    """Large tensors are mapped and page-faulted anew at every op otherwise."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def foreign_seconds() -> float:
    """Processor time used by other processes so far, 0 where /proc is missing."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def race(contestants: Contestants, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every round, for about `seconds` a contestant and at least three rounds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in contestants.items():
            elapsed = 0.0
            for _ in range(4):
                others, start = foreign_seconds(), time.perf_counter()
                run()
                elapsed = time.perf_counter() - start
                if foreign_seconds() - others <= max(0.05 * elapsed, 0.02):  # /proc/stat ticks every 10 ms
                    break
            times[name].append(1e3 * elapsed)
    return times


def cell(times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def scan(backend: str, inputs: list[torch.Tensor], gap: torch.Tensor, gap_delta: torch.Tensor) -> None:
    use_backend(backend)
    u, delta, A, B, C = inputs
    result = selective_scan(u, delta, A, B, C, gap=gap, gap_delta=gap_delta)
    if u.requires_grad:
        torch.autograd.grad(result, inputs, torch.ones_like(result))


def scan_table(seconds: float) -> None:
    backends = [name for name, reason in available_backends().items() if reason == "available"]
    titles = " | ".join(f"{name}, ms" for name in backends)
    print(f"| aligned scan | {titles} | G state updates/s, {backends[0]} |\n" + "|---" * (len(backends) + 2) + "|")
    for backward in (False, True):
        for title, (batch, length, channels) in SHAPES.items():
            wide, narrow = (batch, length, channels), (batch, length, STATE)
            A = -torch.rand(channels, STATE) * 16
            inputs = [torch.randn(wide), torch.randn(wide) - 3, A, torch.randn(narrow), torch.randn(narrow)]
            inputs = [tensor.requires_grad_(backward) for tensor in inputs]
            gap, gap_delta = torch.ones(batch, length), torch.rand(channels)
            times = race({name: partial(scan, name, inputs, gap, gap_delta) for name in backends}, seconds)
            rate = f"{batch * length * channels * STATE / statistics.median(times[backends[0]]) / 1e6:.2f}"
            name = f"{title}, forward + backward" if backward else f"{title}, forward"
            print(f"| {name} | " + " | ".join(cell(times[b]) for b in backends) + f" | {'' if backward else rate} |")
    use_backend("auto")


def model_table(seconds: float) -> None:
    """Pruned right after the first block, so that nearly every block has the same share of the tokens."""
    print("| Vim-T, 224 x 224 | keep | ms a batch | images/s | faster than dense | ideal |\n" + "|---" * 6 + "|")
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224)
        models = {keep: Vim(VimConfig()).eval() for keep in (1.0, 0.8, 0.65, 0.5)}
        for keep, model in models.items():
            compress(model, keep, points=[1], alignment="null")
        times = race({str(keep): partial(model, images) for keep, model in models.items()}, seconds)
        dense = statistics.median(times["1.0"])
        for keep, model in models.items():
            median = statistics.median(times[str(keep)])
            lengths = model.pruner.settings.schedule.tokens_per_block(model.stages)  # type: ignore[union-attr]
            ideal = 24 * 197 / sum(lengths)
            row = (f"batch {batch}", f"{keep:g}", cell(times[str(keep)]), f"{1e3 * batch / median:.1f}")
            print(f"| {' | '.join(row)} | {dense / median:.2f}x | {ideal:.2f}x |")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each contestant and row")
    arguments = parser.parse_args()
    keep_freed_memory()
    scan_table(arguments.seconds)
    print()
    with torch.inference_mode():
        model_table(arguments.seconds)
    print(
        f"\n{processor()}, {torch.get_num_threads()} threads; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; median (quartiles)."
    )


if __name__ == "__main__":
    main()
