"""Speed on a GPU: tests of the kernels first, then tables, the most important one first.

    python recipes/bench/gpu.py [--minutes 8] [--csv benchmarks/results/gpu.csv]

prints Markdown tables, and with --csv writes each to a file beside it (gpu_models.csv, ...) after every row, and every
line with its time to the same name with `.log`. In this order:

    models         Vim-T and Vim-S, dense, half of the tokens, and half in sight; share of the ideal
    prune_point    one prune point by our kernels and by PyTorch's
    launches       kernels a block, of sessions that may fuse blocks and of others
    agreement      of the scan with float64
    scan, scan_backward   beside mamba-ssm's kernel ("stock, alone": channels first, not aligned) and the memory's speed
    families       PlainMamba-L1 and VMamba-T, with DeiT-T, DeiT-S and ConvNeXt-T of timm if it is installed
    splits         the scan in parts of several lengths

Times are by CUDA events, after a warm-up; contestants take turns; figures are medians over rounds, with the quartiles.
"graph" is a session, or a CUDA graph, which leaves Python out. What the time runs out for is named at the end. Exit
code 1 without a GPU, or if a test or a row failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

import ssmprune_cli
from gpu_clock import Clock, Report
from gpu_models import Bench, Make, end_to_end, families, launches, prune_points
from gpu_scans import STATE, Shape, agreement, bandwidth, scans, splits
from ssmprune_cli.kernels import available_backends, pick
from ssmprune_cli.models import FAMILIES

ROOT = Path(__file__).parents[2]
TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("prune", "triton", "triton_inner", "grid_conv"))
NOT_NOW = "not interpreter and not int32"  # without a GPU's use, and 40 GiB of it
PACKAGES = ("torch", "triton", "mamba-ssm", "causal-conv1d", "timm")


def of_family(family: str, variant: str) -> Make:
    known = FAMILIES.get(family)
    return partial(known.build, known.variants[variant])


@dataclass(frozen=True)
class Sizes:
    """Of what is measured."""

    vims: dict[str, Make]
    widths: dict[str, int]  # of a prune point's tokens
    others: dict[str, Make]
    batches: Sequence[int]
    family_batches: Sequence[int]
    tokens: int
    scans: dict[str, Shape]
    backward: dict[str, Shape]
    splits: dict[str, Shape]
    parts: Sequence[int]
    copy: int  # bytes


FULL = Sizes(
    vims={"Vim-T": of_family("vim", "vim_tiny"), "Vim-S": of_family("vim", "vim_small")},
    widths={"Vim-T": 192, "Vim-S": 384},
    others={
        "PlainMamba-L1": of_family("plainmamba", "plainmamba_l1"),
        "VMamba-T": of_family("vmamba", "vmamba_tiny_s1l8"),
    },
    batches=(64, 256),
    family_batches=(1, 64, 256),
    tokens=197,
    scans={
        "Vim-T b64": (64, 197, 384),
        "Vim-S b64": (64, 197, 768),
        "Vim-T b1": (1, 197, 384),
        "Vim-S b1": (1, 197, 768),
        "L 4096 b1": (1, 4096, 384),
        "L 16384 b1": (1, 16384, 384),
        "L 65536 b1": (1, 65536, 384),
        "L 4096 b64": (64, 4096, 384),
        "Vim-T b256": (256, 197, 384),
    },
    backward={
        "Vim-T b64": (64, 197, 384),
        "Vim-S b64": (64, 197, 768),
        "Vim-T b1": (1, 197, 384),
        "L 4096 b1": (1, 4096, 384),
        "L 4096 b64": (64, 4096, 384),
    },
    splits={
        f"L {length} b{batch}": (batch, length, 384)
        for batch in (1, 8, 64)
        for length in (197, 1024, 4096, 16384)
        if batch * length < 2**19
    },
    parts=(16, 32, 64, 128, 256, 512, 1024),
    copy=2**30,
)


def run_tests(report: Report, tests: Sequence[str], seconds: float) -> None:
    """Tests of the kernels, in a process of their own that gets no more than `seconds`."""
    if importlib.util.find_spec("pytest") is None or importlib.util.find_spec("hypothesis") is None:
        report.line("The tests are left out: pytest and hypothesis are not both installed.")
        return
    there = [each for each in tests if (ROOT / each).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", NOT_NOW, *there]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        report.fail(f"The tests took more than {seconds:g} s.")
        return
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    summary = f"Tests of the kernels: {''.join(last)}"
    if done.returncode == 0:
        report.line(summary)
        return
    report.fail(summary)
    for line in (done.stdout + done.stderr).splitlines():
        report.log(line)


def measure(bench: Bench, sizes: Sizes) -> None:
    """All tables."""
    rate = bandwidth(bench.clock, bench.report, bench.seconds, sizes.copy)
    bench.report.line(f"\nA copy moves {rate / 1e9:.2f} TB/s: the memory floor of a scan is its bytes at this rate.")
    bench.report.carry_out(
        [
            end_to_end(bench, sizes.vims, sizes.batches),
            prune_points(bench, sizes.widths, sizes.batches, sizes.tokens),
            launches(bench, sizes.vims, sizes.batches[0]),
            agreement(bench, (4, sizes.tokens, next(iter(sizes.scans.values()))[2])),
            scans(bench, sizes.scans, rate, backward=False),
            scans(bench, sizes.backward, rate, backward=True),
            families(bench, sizes.others, sizes.family_batches),
            splits(bench, sizes.splits, sizes.parts),
        ]
    )


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8, help="after which no new row is started")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each contestant and row")
    parser.add_argument("--test-seconds", type=float, default=100, help="that the tests get; 0 leaves them out")
    parser.add_argument("--csv", type=Path, help="write the tables here too, each to a file of its own name")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("recipes/bench/gpu.py needs a CUDA device, and PyTorch sees none here.")
    device = torch.cuda.get_device_properties(0)
    report = Report(arguments.csv, arguments.minutes)
    versions = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    report.tables.measured_on(
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; ssmprune "
        f"{ssmprune_cli.__version__}, {versions}, Python {platform.python_version()}; median (quartiles)."
    )
    for name, reason in available_backends().items():
        report.log(f"backend {name}: {reason}")
    report.line(f"Models run on the backend {pick(torch.empty(0, device='cuda'), STATE).name}.")
    if arguments.test_seconds:
        run_tests(report, TESTS, arguments.test_seconds)
    measure(Bench(Clock(), report, arguments.seconds), FULL)
    if report.failures:
        raise SystemExit(f"{len(report.failures)} of the tests and rows failed: {'; '.join(report.failures)}")


if __name__ == "__main__":
    main()
