"""Time and memory of a Mamba against the length of a text: a table of docs/results.md.

    python recipes/bench/lengths.py [--lengths 1024,4096,16384,65536] [--depth 4] [--keep 0.5] [--rounds 5]
        [--tables time,processor] [--csv benchmarks/results/lengths.csv]

A few layers as wide as mamba-130m (768) with random weights and a vocabulary of bytes, one window a batch, dense and
with half of the tokens dropped after the first layer. Time is the median with quartiles; the models take turns at each
length. The rows below say how both grow: the exponent p of time ~ tokens^p (1 is linear), and the bytes of peak memory
that one more token takes. The table `processor` has the processor's time, which other programs do not count into, what
the system took of it, and the pages that it had to map. `picture` draws lengths.csv; results.py calls it.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from pathlib import Path

import torch

import ssmprune_cli
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import Backbone
from ssmprune_cli.models.language.mamba1.model import Mamba1Config, Mamba1LM
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure import machine
from ssmprune_cli.workflows.reporting import length_plot
from ssmprune_cli.workflows.scaling import Point, Scaling, Slope, scaling
from tables import Tables, read


def model(depth: int, length: int, keep: float | None) -> Backbone:
    torch.manual_seed(0)
    found = Mamba1LM(Mamba1Config(vocab_size=256, embed_dim=768, depth=depth, length=length)).eval()
    if keep is not None:
        compress(found, keep, points=[1], reduction="drop", alignment="null")
    return found


def picture(csv: Path) -> str:
    """An SVG of what `lengths.csv` and `lengths_slope.csv` beside it hold."""
    table = read(csv)
    names = [title.removesuffix(": ms") for title in table.titles if title.endswith(": ms")]
    places = {title: place for place, title in enumerate(table.titles)}
    points: dict[str, tuple[Point, ...]] = {}
    for name in names:
        own = []
        for row in table.rows:
            ms, work, memory = (row[places[f"{name}: {what}"]] for what in ("ms", "G multiply-adds", "MiB"))
            median, low, high = (
                float(each) for each in ms.replace("(", "").replace(")", "").replace("to ", "").split()
            )
            tokens = int(row[0].replace(",", ""))
            own.append(Point(tokens, median, (low, high), 0, int(float(work) * 1e9), int(float(memory) * 2**20)))
        points[name] = tuple(own)
    slopes = {
        name: Slope(float(exponent), 1024 * float(kib))
        for name, exponent, kib in read(csv.with_stem(f"{csv.stem}_slope")).rows
    }
    sizes = tuple(point.tokens for point in points[names[0]])
    threads = int(table.about["machine"].partition(" thread")[0].rpartition(" ")[2])
    return length_plot(Scaling("tokens", sizes, 1, "float32", "cpu", threads, points, slopes))


def processor(run: Tables, models: dict[str, Backbone], lengths: list[int], rounds: int) -> None:
    """The processor's time for a token, in turns. Short windows come several times in one."""
    sessions = {name: prepare(each) for name, each in models.items()}
    found: dict[tuple[str, int], list[tuple[float, float, float]]] = {}
    for turn in range(rounds + 1):
        for length in lengths:
            for name, session in sessions.items():
                window = torch.randint(256, (1, length), generator=torch.Generator().manual_seed(0))
                times = max(1, 8192 // length)
                before = resource.getrusage(resource.RUSAGE_SELF)
                for _ in range(times):
                    session(window)
                after = resource.getrusage(resource.RUSAGE_SELF)
                used = (after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime)
                if turn:  # the first one warms up
                    tokens = times * length
                    faults = (after.ru_minflt - before.ru_minflt) / tokens
                    found.setdefault((name, length), []).append(
                        (1e6 * sum(used) / tokens, 1e6 * used[1] / tokens, faults)
                    )
    run.start("processor", "model", "tokens", "us a token", "of these, the system", "pages mapped a token")
    for name in sessions:
        for length in lengths:
            whole, system, mapped = (list(each) for each in zip(*found[name, length], strict=True))
            cells = (f"{statistics.median(each):.1f} ({min(each):.1f} to {max(each):.1f})" for each in (whole, system))
            run.row(name, f"{length:,}", *cells, f"{statistics.median(mapped):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="1024,4096,16384,65536")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tables", default="time,processor")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    lengths = [int(each) for each in arguments.lengths.split(",")]
    named = {
        "dense": model(arguments.depth, lengths[0], None),
        f"keep {arguments.keep:g}": model(arguments.depth, lengths[0], arguments.keep),
    }
    tables = arguments.tables.split(",")
    run = Tables(arguments.csv)
    threads = torch.get_num_threads()
    run.measured_on(
        f"{machine(arguments.device)}, {threads} thread{'s' * (threads > 1)}; ssmprune {ssmprune_cli.__version__}, "
        f"torch {torch.__version__}; backend {active_backend(arguments.device)}; {arguments.depth} layers of width 768"
    )
    if "time" in tables:
        timed(run, named, lengths, arguments.device, arguments.rounds)
    if "processor" in tables:
        processor(run, named, lengths, arguments.rounds)


def timed(run: Tables, named: dict[str, Backbone], lengths: list[int], device: str, rounds: int) -> None:
    """Time and memory at each length, and how they grow."""
    found = scaling(named, lengths, unit="tokens", device=device, rounds=rounds)
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
