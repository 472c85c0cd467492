"""Speed on a GPU: the scan backends beside the memory's own speed, and Vim-T and Vim-S dense against pruned.

    python recipes/bench/gpu.py [--minutes 9] [--csv benchmarks/results/gpu.csv]

prints Markdown tables, and with --csv writes each to a file beside it (gpu_models.csv, ...) and every line with its
time to the same name with `.log`. Times are by CUDA events, after a warm-up; contestants take turns; figures are
medians over rounds, with the quartiles. "graph" replays a CUDA graph, which leaves Python out; the scans of `triton`
and `mamba_cuda` are timed so, `chunked` is not (its thousands of launches are its cost; long ones are left out).
"stock, alone" is mamba-ssm's kernel as its own models call it: channels first, not aligned. Rows for which the time
ran out are left out. Without a GPU: exit code 1.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.kernels import available_backends, selective_scan, use_backend
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.models.mamba.vim import Vim, VimConfig
from ssmprune_cli.pruning import compress
from ssmprune_cli.pruning.importance import IMPORTANCES
from ssmprune_cli.pruning.reduction import REDUCTIONS
from ssmprune_cli.tokens import TokenSequence
from ssmprune_cli.workflows.profile import tokens_per_block
from tables import Tables

# (tokens, channels)
SHAPES = {"Vim-T": (197, 384), "Vim-S": (197, 768), "L 4096": (4096, 384), "L 16384": (16384, 384)}
BATCHES = (64, 256, 1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE = 16
WIDTHS = {"Vim-T": 192, "Vim-S": 384}
GPU_BACKENDS = ("triton", "mamba_cuda", "chunked")
STOCK = "stock, alone"
LONGEST_CHUNKED = 64 * 4096  # tokens of a batch
Run = Callable[[], object]


class Report:
    """Lines that go to the terminal and, with their times, to the log beside the CSV files."""

    def __init__(self, csv: Path | None, minutes: float) -> None:
        self._start = time.monotonic()
        self._deadline = self._start + 60 * minutes
        self._log = csv and csv.with_suffix(".log")
        self.tables = Tables(csv, self.line)
        if self._log is not None:
            self._log.write_text(f"started {datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC\n")

    def line(self, text: str = "") -> None:
        print(text, flush=True)
        self.log(text)

    def log(self, text: str) -> None:
        if self._log is not None:
            with self._log.open("a") as file:
                file.write(f"{time.monotonic() - self._start:7.1f} s  {text}\n")

    @property
    def over(self) -> bool:
        return time.monotonic() > self._deadline


def milliseconds(run: Run, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    elapsed: float = start.elapsed_time(end)
    return elapsed / calls


def race(contestants: dict[str, Run], report: Report, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a call in every round. Those that cannot run, for want of memory say, are left out and logged."""
    times: dict[str, list[float]] = {}
    calls: dict[str, int] = {}
    for name, run in contestants.items():
        try:
            run()
            first = milliseconds(run, 1)
            for _ in range(3 if first < 100 else 0):
                run()
            calls[name] = max(1, min(200, round(10 / max(milliseconds(run, 1), 1e-3))))  # about 10 ms a round
            times[name] = []
        except RuntimeError as error:
            report.log(f"{name} did not run: {error}")
            torch.cuda.empty_cache()
    end = time.monotonic() + seconds * len(times)
    while times and (time.monotonic() < end or min(map(len, times.values())) < 3):
        for name, found in times.items():
            found.append(milliseconds(contestants[name], calls[name]))
    return times


def graphed(run: Run) -> Run:
    """`run` recorded as a CUDA graph; its inputs and outputs stay where they are."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def cell(times: list[float] | None) -> str:
    if times is None:
        return "did not run"
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def bandwidth(report: Report, seconds: float) -> float:
    """Bytes a millisecond that a copy of 1 GiB reads and writes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / statistics.median(race({"copy": partial(target.copy_, source)}, report, seconds)["copy"])


def scan(backend: str, inputs: list[Tensor], gap: Tensor, gap_delta: Tensor, grad: Tensor | None) -> None:
    use_backend(backend)
    u, delta, A, B, C = inputs
    result = selective_scan(u, delta, A, B, C, gap=gap, gap_delta=gap_delta)
    if grad is not None:
        torch.autograd.grad(result, inputs, grad)


def stock_scan(inputs: list[Tensor], grad: Tensor | None) -> None:
    """The same without alignment by mamba-ssm's own function, everything (B, channels, L) but A."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u, delta, A, B, C = inputs
    result = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    if grad is not None:
        torch.autograd.grad(result, inputs, grad)


def agreement(report: Report) -> None:
    """Of every backend with float64, before anything is timed."""
    backends = [name for name in GPU_BACKENDS if available_backends()[name] == "available"]
    report.tables.start(
        "agreement", "largest error, of the largest entry", *(f"{name}, {p}" for name in backends for p in DTYPES)
    )
    wide, narrow = (4, 197, 384), (4, 197, STATE)
    shapes = (wide, wide, (384, STATE), narrow, narrow, wide[:2], wide[2:], wide)
    values = [torch.randn(shape, device="cuda").bfloat16().double() for shape in shapes]
    values[2], values[5], values[6] = -values[2].abs(), values[5].round().abs(), values[6].abs()
    truth = value_and_gradients("chunked", values)
    columns = [
        value_and_gradients(name, [v.to(dtype) for v in values]) for name in backends for dtype in DTYPES.values()
    ]
    for row, name in enumerate(("y", "u", "delta", "A", "B", "C")):
        expected = truth[row]
        errors = [((found[row].double() - expected).abs().max() / expected.abs().max()).item() for found in columns]
        report.tables.row(name, *(f"{error:.1e}" for error in errors))
    use_backend("auto")


def value_and_gradients(backend: str, values: list[Tensor]) -> list[Tensor]:
    use_backend(backend)
    inputs = [value.requires_grad_() for value in values[:5]]
    y = selective_scan(inputs[0], inputs[1], inputs[2], inputs[3], inputs[4], gap=values[5], gap_delta=values[6])
    return [y.detach(), *torch.autograd.grad(y, inputs, values[7])]


def scan_tables(report: Report, rate: float, seconds: float) -> None:
    backends = [name for name in GPU_BACKENDS if available_backends()[name] == "available"]
    contestants = [*backends, STOCK] if "mamba_cuda" in backends else backends
    for backward in (False, True):
        kind = "forward + backward" if backward else "forward"
        titles = (*(f"{name}, ms" for name in contestants), "memory floor, ms", "of the floor")
        report.tables.start("scan_backward" if backward else "scan", f"aligned scan, {kind}", *titles)
        for batch in BATCHES:
            for title, (length, channels) in SHAPES.items():
                for precision, dtype in DTYPES.items():
                    if not report.over:
                        name = f"{title} b{batch}, {precision}"
                        shape = (batch, length, channels)
                        scan_row(report, name, shape, dtype, contestants, backward, rate, seconds)
                    torch.cuda.empty_cache()
    use_backend("auto")


def scan_row(
    report: Report,
    name: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backends: list[str],
    backward: bool,
    rate: float,
    seconds: float,
) -> None:
    batch, length, channels = shape
    narrow = (batch, length, STATE)
    # Read u, delta, B, C, gap and write y; then read those and dL/dy, and write four gradients.
    passes = (3, 2) if not backward else (3 + 5, 2 + 4)
    size = torch.empty((), dtype=dtype).element_size()
    floor = size * batch * length * (passes[0] * channels + passes[1] * STATE) / rate
    titled = partial(torch.randn, device="cuda", dtype=dtype)
    try:
        A = -torch.rand(channels, STATE, device="cuda", dtype=dtype) * 16
        inputs = [titled(shape), titled(shape).sub_(3), A, titled(narrow), titled(narrow)]
        inputs = [tensor.requires_grad_(backward) for tensor in inputs]
        gap, gap_delta = titled(batch, length).ge(1).to(dtype), titled(channels).abs_()
        grad = titled(shape) if backward else None
    except torch.OutOfMemoryError:
        report.tables.row(name, *(cell(None) for _ in backends), f"{floor:.3f}", "")
        return
    contestants: dict[str, Run] = {}
    for backend in backends:
        if backend == "chunked" and batch * length > LONGEST_CHUNKED:
            continue
        run = partial(scan, backend, inputs, gap, gap_delta, grad)
        if backend == STOCK:
            first = [channels_first(tensor).requires_grad_(backward) for tensor in inputs]
            run = partial(stock_scan, first, None if grad is None else channels_first(grad))
        try:
            contestants[backend] = run if backend == "chunked" else graphed(run)
        except RuntimeError as error:
            report.log(f"{backend} did not run: {error}")
            torch.cuda.empty_cache()
    times = race(contestants, report, seconds)
    share = f"{floor / statistics.median(times[backends[0]]):.0%}" if backends[0] in times else ""
    report.tables.row(name, *(cell(times.get(backend)) for backend in backends), f"{floor:.3f}", share)


def channels_first(tensor: Tensor) -> Tensor:
    """(B, L, c) to (B, c, L), as mamba-ssm takes it; A (E, N) stays, in float32."""
    found = tensor.detach()
    return found.float() if found.ndim == 2 else found.transpose(1, 2).contiguous()


def model_table(report: Report, seconds: float) -> None:
    """bfloat16 weights. Half of the tokens are dropped after the first block, or in three steps as published."""
    plans = {
        "dense": (1.0, [1], "drop"),
        "half, after block 1": (0.5, [1], "drop"),
        "0.7 at blocks 6, 12, 18": (0.7, [6, 12, 18], "drop"),
        "half, in sight": (0.5, [1], "context"),
    }
    titles = ("eager, ms a batch", "graph, ms a batch", "images/s, graph", "faster, graph", "ideal", "of ideal, graph")
    report.tables.start("models", "model", "tokens", *titles)
    for name, dim in WIDTHS.items():
        for batch in (64, 256):
            images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
            contestants: dict[str, Run] = {}
            ideals = {}
            for plan, (keep, points, reduction) in plans.items():
                with torch.inference_mode(False):  # tensors made in inference mode are never cached
                    model = Vim(VimConfig(embed_dim=dim)).eval()
                    compress(model, keep, points=points, reduction=reduction, alignment="null")
                    model.to("cuda", torch.bfloat16)
                ideals[plan] = 24 * 197 / sum(tokens_per_block(model))
                run = partial(model, images)
                contestants |= {f"{plan}, eager": run, f"{plan}, graph": graphed(run)}
            times = race(contestants, report, seconds)
            dense = statistics.median(times["dense, graph"])
            for plan, ideal in ideals.items():
                median = statistics.median(times[f"{plan}, graph"])
                faster = dense / median
                cells = [cell(times[f"{plan}, {way}"]) for way in ("eager", "graph")]
                cells += [f"{1e3 * batch / median:.0f}", f"{faster:.2f}x", f"{ideal:.2f}x", f"{faster / ideal:.0%}"]
                report.tables.row(f"{name} b{batch}", plan, *cells)


def pruning_table(report: Report, seconds: float) -> None:
    """What one prune point costs: score, rank, sort, gather."""
    report.tables.start("prune_point", "one prune point, bfloat16", "eager, ms", "graph, ms")
    for name, dim in WIDTHS.items():
        for batch in (64, 256):
            hidden = torch.randn(batch, 197, dim, device="cuda", dtype=torch.bfloat16)
            sequence = TokenSequence(hidden, hidden.float(), _positions(batch), 197, (98,))
            outputs = tuple(torch.randn(batch, 197, 2 * dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
            run = partial(prune, sequence, ScanStatistics(outputs))
            times = race({"eager": run, "graph": graphed(run)}, report, seconds)
            report.tables.row(f"{name} b{batch}", cell(times["eager"]), cell(times["graph"]))


def _positions(batch: int) -> Tensor:
    return torch.arange(197, device="cuda").expand(batch, 197)


def prune(sequence: TokenSequence, given: ScanStatistics) -> TokenSequence:
    score = IMPORTANCES.get("clip").score(sequence, given, 0, 0)
    return REDUCTIONS.get("drop").apply(sequence, score, 99)


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="after which no new row is started")
    parser.add_argument("--seconds", type=float, default=0.4, help="for each contestant and row")
    parser.add_argument("--csv", type=Path, help="write the tables here too, each to a file of its own name")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("recipes/bench/gpu.py needs a CUDA device, and PyTorch sees none here.")
    device = torch.cuda.get_device_properties(0)
    report = Report(arguments.csv, arguments.minutes)
    packages = ("torch", "triton", "mamba-ssm", "causal-conv1d")
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    machine = (
        f"{device.name}, {device.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; ssmprune "
        f"{ssmprune_cli.__version__}, {versions}, Python {platform.python_version()}; median (quartiles)."
    )
    for name, reason in available_backends().items():
        report.log(f"backend {name}: {reason}")
    report.tables.measured_on(machine)
    rate = bandwidth(report, arguments.seconds)
    report.line(f"\nA copy moves {rate / 1e9:.2f} TB/s: the memory floor of a scan is its bytes at this rate.")
    agreement(report)
    report.line(f"\nModels run on the backend {pick(torch.empty(0, device='cuda'), STATE).name}.")
    with torch.inference_mode():
        model_table(report, arguments.seconds)
        pruning_table(report, arguments.seconds)
    scan_tables(report, rate, arguments.seconds)


if __name__ == "__main__":
    main()
