"""Speed on this CPU: the scan backends at published shapes, and Vim-T against its floor and against itself pruned.

    python recipes/bench/speed.py [--seconds 5] [--csv benchmarks/results/speed.csv]

prints Markdown tables, and with --csv writes each to a file beside it (speed_scan.csv, ...). Contestants take turns
in one process; figures are medians over rounds, with the quartiles. A round in which other processes used the
processors is run again, at most three times. glibc is told to keep freed memory, for all contestants alike, as a warm
server would. Weights and inputs are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import ssmprune_cli
from ssmprune_cli.cli.allocator import keep_freed_memory
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import (
    active_backend,
    add_rms_norm,
    backends_for,
    causal_conv1d,
    gated_sum,
    grid_conv2d,
    selective_scan,
    use_backend,
)
from ssmprune_cli.kernels.cpu.build import processor_flags
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure.floor import floor
from ssmprune_cli.workflows.measure.flops import count_flops
from ssmprune_cli.workflows.measure.machine import machine
from ssmprune_cli.workflows.profile import tokens_per_block
from tables import Tables

SHAPES = {"Vim-T b1": (1, 197, 384), "Vim-T b8": (8, 197, 384), "Vim-S b1": (1, 197, 768), "L 4096 b1": (1, 4096, 384)}
STATE = 16
TURN = 0.01  # seconds that a contestant runs at a time
Contestants = dict[str, Callable[[], object]]


def foreign_seconds() -> float:
    """Processor time used by other processes so far, 0 where /proc is missing."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK") - sum(os.times()[:2])


def race(contestants: Contestants, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of a run in every round, for about `seconds` a contestant and at least three rounds.

    In a round a contestant runs once before it is timed, as the one before it has emptied the caches, and then as often
    as fills TURN: between the short runs that a clock could tell apart, threads would fall asleep as in no model.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    counts: dict[str, int] = {}
    for name, run in contestants.items():
        run()
        start = time.perf_counter()
        run()
        counts[name] = math.ceil(TURN / (time.perf_counter() - start))
    end = time.perf_counter() + seconds * len(contestants)
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, run in contestants.items():
            elapsed = 0.0
            run()
            for _ in range(4):
                others, start = foreign_seconds(), time.perf_counter()
                for _ in range(counts[name]):
                    run()
                elapsed = time.perf_counter() - start
                if foreign_seconds() - others <= max(0.05 * elapsed, 0.02):  # /proc/stat ticks every 10 ms
                    break
            times[name].append(1e3 * elapsed / counts[name])
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


def published_scan(inputs: list[torch.Tensor], gap: torch.Tensor, gap_delta: torch.Tensor) -> torch.Tensor:
    """The scan as published code writes it in PyTorch (state-spaces/mamba e9594ce, `selective_scan_ref`): decays and
    inputs of all tokens first, (B, E, L, N) each, then token by token. Our `reference` makes them as it goes."""
    u, delta, A, B, C = inputs
    step = torch.nn.functional.softplus(delta)
    decays = torch.exp(torch.einsum("ble,en->beln", step + gap[..., None] * gap_delta, A))
    drives = torch.einsum("ble,bln,ble->beln", step, B, u)
    state = u.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[1]):
        state = decays[:, :, t] * state + drives[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, C[:, t]))
    return torch.stack(outputs, dim=1)


def scan_table(tables: Tables, seconds: float) -> None:
    """Time, rate and error of every backend; the reference's own float32 error is the measure of the others'.

    The published formulation is timed forward only: under autograd its time grows with the square of the length.
    """
    backends = backends_for(torch.zeros(1))
    titles = [f"{name}, ms" for name in (*backends, "published")]
    ratios = ", ".join((*backends[1:], "published"))
    rest = (f"{backends[0]} against {ratios}", "G updates/s", "error", "memory, MiB")
    tables.start("scan", "aligned scan", *titles, *rest)
    for backward in (False, True):
        for title, (batch, length, channels) in SHAPES.items():
            wide, narrow = (batch, length, channels), (batch, length, STATE)
            A = -torch.rand(channels, STATE) * 16
            inputs = [torch.randn(wide), torch.randn(wide) - 3, A, torch.randn(narrow), torch.randn(narrow)]
            inputs = [tensor.requires_grad_(backward) for tensor in inputs]
            gap, gap_delta = torch.ones(batch, length), torch.rand(channels)
            contestants: Contestants = {name: partial(scan, name, inputs, gap, gap_delta) for name in backends}
            if not backward:
                contestants["published"] = partial(published_scan, inputs, gap, gap_delta)
            times = race(contestants, seconds)
            best, *others = (statistics.median(found) for found in times.values())
            row = [
                f"{title}, forward{' + backward' if backward else ''}",
                *(cell(found) for found in times.values()),
                *([""] if backward else []),
                ", ".join(f"{other / best:.1f}x" for other in others),
            ]
            if not backward:
                row.append(f"{batch * length * channels * STATE / best / 1e6:.2f}")
                row.append(f"{error_ratio(backends[0], inputs, gap, gap_delta):.2f}")
                row.append(f"{extra_memory(partial(scan, backends[0], inputs, gap, gap_delta)):.1f}")
            else:
                row += ["", "", ""]
            tables.row(*row)
    use_backend("auto")


def error_ratio(backend: str, inputs: list[torch.Tensor], gap: torch.Tensor, gap_delta: torch.Tensor) -> float:
    """Error of `backend` against float64 (root mean square), in units of the float32 reference's.

    The largest error is a matter of luck: among few values it differs by a factor of three from draw to draw.
    """

    def run(name: str, dtype: torch.dtype) -> torch.Tensor:
        use_backend(name)
        u, delta, A, B, C = (tensor.to(dtype) for tensor in inputs)
        return selective_scan(u, delta, A, B, C, gap=gap, gap_delta=gap_delta.to(dtype)).double()

    truth = run("reference", torch.float64)
    own, reference = ((run(name, torch.float32) - truth).square().mean().sqrt() for name in (backend, "reference"))
    return float(own / reference)


def extra_memory(run: Callable[[], object]) -> float:
    """MiB by which resident memory peaks above what was resident before, output included; Linux only."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")

    def resident(key: str) -> float:
        return int(status.read_text().split(f"{key}:")[1].split()[0]) / 1024

    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    clear.write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def small_ops_table(tables: Tables, seconds: float) -> None:
    """What surrounds the scan, at Vim-T shapes, batch 8."""
    batch, length, channels = SHAPES["Vim-T b8"]
    backends = [name for name in backends_for(torch.zeros(1)) if name != "reference"]
    projected, y = torch.randn(batch, length, 2 * channels), torch.randn(batch, length, channels)
    x, z = projected.chunk(2, dim=-1)
    hidden, weight = torch.randn(batch, length, channels // 2), torch.randn(channels // 2)
    taps, bias, square = torch.randn(channels, 4), torch.randn(channels), torch.randn(channels, 7, 7)
    kept = torch.stack([torch.randperm(196)[:98].sort().values for _ in range(batch)])
    ops: dict[str, Callable[[], object]] = {
        "causal convolution + SiLU": lambda: causal_conv1d(x, taps, bias),
        "add + RMSNorm": lambda: add_rms_norm(hidden, hidden, weight, 1e-5),
        "sum of directions + gate": lambda: gated_sum((y, y), z, 0.5),
        "7 x 7 grid convolution + SiLU, dense": lambda: grid_conv2d(x[:, :196], square, bias, (14, 14)),
        "the same, half of the tokens": lambda: grid_conv2d(x[:, :98], square, bias, (14, 14), kept),
    }
    tables.start("ops", "op, batch 8", *(f"{name}, ms" for name in backends), "ratio")

    def on(name: str, op: Callable[[], object]) -> None:
        use_backend(name)
        op()

    for title, op in ops.items():
        times = race({name: partial(on, name, op) for name in backends}, seconds / 2)
        medians = [statistics.median(times[name]) for name in backends]
        ratio = f"{medians[-1] / medians[0]:.1f}x"
        tables.row(title, *(cell(times[name]) for name in backends), ratio)
    use_backend("auto")


def floor_table(tables: Tables, seconds: float) -> None:
    """Whole dense Vim-T: with the fast kernels, the same op by op, with the reference scan, and the sum of the floors.

    The floors are what GEMMs of the model's own shapes and scans of its own shape take when nothing else is done.
    """
    titles = ("op by op, ms", "reference scan, ms", "reference / this", "floor, ms", "floor / this")
    tables.start("dense", "Vim-T, 224 x 224, dense", "ms a batch", "images/s", *titles)
    model = Vim(VimConfig()).eval()
    session = prepare(model)

    def on(name: str, images: torch.Tensor) -> None:
        use_backend(name)
        model(images)

    best = active_backend()
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224)
        times = race({"fast": partial(session, images), "apart": partial(on, best, images)}, seconds)
        times |= race({"reference": partial(on, "reference", images)}, seconds)
        fast, slow = statistics.median(times["fast"]), statistics.median(times["reference"])
        use_backend(best)
        least = floor(session, images, rounds=20).multiply_adds_ms
        row = [f"batch {batch}", cell(times["fast"]), f"{1e3 * batch / fast:.1f}", cell(times["apart"])]
        row += [cell(times["reference"]), f"{slow / fast:.1f}x", f"{least:.1f}", f"{100 * least / fast:.0f} %"]
        tables.row(*row)
    use_backend("auto")


def model_table(tables: Tables, seconds: float) -> None:
    """Pruned right after the first block, so that nearly every block has the same share of the tokens.

    "Ideal" is 1 / (mean kept fraction): what dropped tokens would save if they cost nothing at all. In bfloat16
    where the processor has it.
    """
    titles = ("ms a batch", "images/s", "faster than dense", "ideal", "of ideal")
    tables.start("pruned", "Vim-T, 224 x 224", "keep, reduction", *titles)
    variants = {"1": (1.0, "drop"), "0.8, drop": (0.8, "drop"), "0.65, drop": (0.65, "drop")}
    variants |= {"0.5, drop": (0.5, "drop"), "0.5, context": (0.5, "context")}
    for batch in (1, 8):
        images = torch.randn(batch, 3, 224, 224)
        models = {title: Vim(VimConfig()).eval() for title in variants}
        for title, (keep, reduction) in variants.items():
            compress(models[title], keep, points=[1], reduction=reduction, alignment="null")
        runs: Contestants = {title: partial(prepare(model), images) for title, model in models.items()}
        if processor_flags() & {"avx512_bf16", "amx_bf16"}:
            for title in ("1", "0.5, drop"):
                models[f"{title}, bfloat16"] = models[title]
                half = prepare(models[title], dtype=torch.bfloat16)
                runs[f"{title}, bfloat16"] = partial(half, images.bfloat16())
        times = race(runs, seconds)
        for title, model in models.items():
            median = statistics.median(times[title])
            dense = statistics.median(times["1, bfloat16" if title.endswith("bfloat16") else "1"])
            ideal = 24 * 197 / sum(tokens_per_block(model))
            row = (f"batch {batch}", title, cell(times[title]), f"{1e3 * batch / median:.1f}")
            share = f"{100 * dense / median / ideal:.0f} %"
            tables.row(*row, f"{dense / median:.2f}x", f"{ideal:.2f}x", share)


def families_table(tables: Tables, seconds: float) -> None:
    """Models whose scans run along routes over the grid, pruned as by default. In bfloat16 where processors have it."""
    titles = ("ms a batch", "images/s", "op by op, ms", "faster than dense", "multiply-adds")
    tables.start("families", "224 x 224", "keep", *titles)

    for family, variant in (("plainmamba", "plainmamba_l1"), ("vmamba", "vmamba_tiny_s1l8")):
        found = FAMILIES.get(family)
        models = {title: found.build(found.variants[variant]).eval() for title in ("1", "0.5", "1, bfloat16")}
        compress(models["0.5"], 0.5, alignment="null")
        work = {title: count_flops(model).all_directions for title, model in models.items()}
        models["1, bfloat16"].bfloat16()
        if not processor_flags() & {"avx512_bf16", "amx_bf16"}:
            del models["1, bfloat16"]
        for batch in (1, 8):
            images = torch.randn(batch, 3, 224, 224)
            runs: Contestants = {
                title: partial(prepare(model), images.to(model.dtype)) for title, model in models.items()
            }
            single: Contestants = {title: partial(each, images.to(each.dtype)) for title, each in models.items()}
            times, slower = race(runs, seconds), race(single, seconds)
            dense = statistics.median(times["1"])
            for title in models:
                median = statistics.median(times[title])
                row = (f"{variant}, batch {batch}", title, cell(times[title]), f"{1e3 * batch / median:.1f}")
                share = f"{work[title] / work['1']:.2f}"
                tables.row(*row, cell(slower[title]), f"{dense / median:.2f}x", share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5, help="for each contestant and row")
    parser.add_argument("--csv", type=Path, help="write the tables here too, each to a file of its own name")
    arguments = parser.parse_args()
    keep_freed_memory()
    tables = Tables(arguments.csv)
    scan_table(tables, arguments.seconds)
    with torch.inference_mode():
        for table in (small_ops_table, floor_table, model_table, families_table):
            table(tables, arguments.seconds)
    tables.measured_on(
        f"{machine()}, {torch.get_num_threads()} threads; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()}; median (quartiles)."
    )


if __name__ == "__main__":
    main()
