"""Exported files against a session of ours on this CPU: ONNX with our kernels and without, OpenVINO and torch's .pt2.

    python recipes/bench/export.py [--seconds 2] [--threads 1] [--models vim_tiny ...] [--targets onnx ...] [--int8]
                                   [--csv FILE]

prints a Markdown table, and with --csv writes it. Models are the published ones, dense and with half of their tokens
after an early block, with random weights: they do not change the time. With --int8 each is there in eight bits too,
all layers that can be. Contestants take turns in one process; figures
are medians over rounds, with the quartiles. Scans in standard operators are slow: who takes longer than LONGEST for one
image is not asked for eight.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from speed import cell, race
from ssmprune_cli.export import TARGETS, export
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import FAMILIES, Backbone, put_in_eight_bits
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure.machine import machine
from tables import Tables

# The family, and the block after which half of the tokens go: of a VMamba the first one of the longest stage.
MODELS = {"vim_tiny": ("vim", 2), "plainmamba_l1": ("plainmamba", 2), "vmamba_tiny_s1l8": ("vmamba", 5)}
LONGEST = 500  # ms
Run = Callable[[torch.Tensor], object]


def build(variant: str, *, pruned: bool, int8: bool) -> Backbone:
    torch.manual_seed(0)
    family, point = MODELS[variant]
    known = FAMILIES.get(family)
    model = known.build(known.variants[variant]).eval()
    if pruned:
        compress(model, 0.5, points=[point])
    if int8:
        put_in_eight_bits(model, model.layers_of(model.linear_kinds))
    return model


def openvino(path: Path, threads: int) -> Mapping[str, Run]:
    import openvino as ov

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = ov.Core().compile_model(str(path), "CPU", settings)
    return {"openvino": lambda images: compiled(images.numpy())}


@dataclass
class Contestant:
    """Who runs a model, the size of its file and how long it takes to open; neither, for a session."""

    name: str
    run: Run
    size: str = ""
    start: str = ""


def contestants(model: Backbone, targets: list[str], threads: int, stem: Path) -> Iterator[Contestant]:
    form = ", int8" if model.eight_bit_kinds else ""
    yield Contestant("session" + form, prepare(model))
    for target in targets:
        path = stem.with_name(f"{stem.name}{form}{target}{TARGETS.get(target).suffix}")
        made = export(model, path, target)
        files: Callable[[], Mapping[str, Run]] = partial(TARGETS.get(target).open, made.path)
        if target == "onnx-plain":
            if find_spec("openvino") is None:
                continue
            files = partial(openvino, made.path, threads)
        begun = time.perf_counter()
        found = dict(files())
        taken = (time.perf_counter() - begun) / len(found)
        for name, run in found.items():
            yield Contestant(name + form, run, f"{made.size / 1e6:.1f}", f"{taken:.2f}")


def compare(tables: Tables, variant: str, options: argparse.Namespace, *, pruned: bool, folder: Path) -> None:
    title = f"{variant}, {'half' if pruned else 'dense'}"
    everyone: list[Contestant] = []
    for int8 in (False, True) if options.int8 else (False,):
        model = build(variant, pruned=pruned, int8=int8)
        everyone += contestants(model, options.targets, options.threads, folder / f"{variant}{pruned}")
    times: dict[int, dict[str, list[float]]] = {}
    for batch in (1, 8):
        images = torch.randn(batch, 3, *model.image_size)
        racing: dict[str, Callable[[], object]] = {}
        for each in everyone:
            if batch == 1 or median(times[1][each.name]) <= LONGEST:
                racing[each.name] = partial(each.run, images)
        with torch.inference_mode():
            times[batch] = race(racing, options.seconds)
    for each in everyone:
        cells = [cell(times[batch][each.name]) if each.name in times[batch] else "" for batch in (1, 8)]
        tables.row(title, each.name, *cells, each.size, each.start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each contestant and batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS.names()), choices=list(TARGETS.names()))
    parser.add_argument("--int8", action="store_true", help="the same models in eight bits too")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = Tables(options.csv)
    tables.start("", "model", "runs on", "batch 1, ms", "batch 8, ms", "file, MB", "opens in, s")
    with tempfile.TemporaryDirectory() as folder:
        for variant in options.models:
            for pruned in (False, True):
                compare(tables, variant, options, pruned=pruned, folder=Path(folder))
    versions = f"torch {torch.__version__}, onnxruntime {version('onnxruntime')}, Python {platform.python_version()}"
    tables.measured_on(f"{machine()}, {options.threads} threads; {versions}")


if __name__ == "__main__":
    main()
