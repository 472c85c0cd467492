"""Images a second of vision SSMs, dense and pruned, beside the models that users would pick instead, on this CPU.

    python recipes/bench/alternatives.py [--seconds 4] [--threads 1] [--batch-sizes 1 8] [--keep 0.7] [--csv FILE]

prints a Markdown table, and with --csv writes it. All take turns in one process; figures are medians over rounds, with
the quartiles. Weights are random, which does not change the time. Ours run as sessions, the others as transformers runs
them (`pip install transformers`). The top-1 is what the authors publish of the dense model on ImageNet-1k, as data:
nothing here measures an accuracy, and of pruned models none is published.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmprune_cli
from speed import cell, race
from ssmprune_cli.catalogue import entries
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import FAMILIES
from ssmprune_cli.pruning import compress
from ssmprune_cli.workflows.measure import machine
from tables import Tables

OURS = {"vim_tiny": "vim", "vmamba_tiny_s1l8": "vmamba", "plainmamba_l1": "plainmamba"}
# Published top-1 in per cent: arXiv 2012.12877, table 5 (without distillation); arXiv 2201.03545, table 1.
OTHERS = {"DeiT-T": 72.2, "DeiT-S": 79.8, "ConvNeXt-T": 82.1}
SIDE = 224


@dataclass(frozen=True)
class Contestant:
    """`run` takes images (B, 3, 224, 224); `top1` is published of the dense model, in per cent."""

    run: Callable[[Tensor], object]
    parameters: int
    tokens: str
    top1: str


def ours(variant: str, keep: float | None) -> Contestant:
    torch.manual_seed(0)
    family = FAMILIES.get(OURS[variant])
    model = family.build(family.variants[variant]).eval()
    if keep is not None:
        compress(model, keep)
    published = next(each.published["top1"] for each in entries() if each.variant == variant)
    tokens = "all" if keep is None else f"keep {keep:g} at each point"
    top1 = "" if keep is not None else f"{published:g}"
    return Contestant(prepare(model), sum(each.numel() for each in model.parameters()), tokens, top1)


def others() -> dict[str, Contestant]:
    """DeiTs without distillation are plain ViTs."""
    transformers: Any = import_module("transformers")
    models: dict[str, nn.Module] = {}
    for name, width, heads in (("DeiT-T", 192, 3), ("DeiT-S", 384, 6)):
        sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
        models[name] = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=1000))
    models["ConvNeXt-T"] = transformers.ConvNextForImageClassification(transformers.ConvNextConfig(num_labels=1000))
    return {
        name: Contestant(model.eval(), sum(each.numel() for each in model.parameters()), "all", f"{OTHERS[name]:g}")
        for name, model in models.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each contestant and batch size")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--keep", type=float, default=0.7, help="of the pruned models, at each of the default points")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if find_spec("transformers") is None:
        sys.exit("the models to compare with come from transformers, which is not installed: pip install transformers")
    torch.set_num_threads(options.threads)
    contestants = others()
    for variant in OURS:
        contestants[variant] = ours(variant, None)
        contestants[f"{variant}, pruned"] = ours(variant, options.keep)
    speeds: dict[int, dict[str, list[float]]] = {}
    for batch in options.batch_sizes:
        images = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            times = race({name: partial(each.run, images) for name, each in contestants.items()}, options.seconds)
        speeds[batch] = {name: [1e3 * batch / ms for ms in taken] for name, taken in times.items()}
    titles = [f"images/s, batch {batch}" for batch in options.batch_sizes]
    tables = Tables(options.csv)
    tables.start("", "model", "tokens", "parameters, M", *titles, "published top-1 of the dense model, %")
    for name, each in contestants.items():
        cells = [cell(speeds[batch][name]) for batch in options.batch_sizes]
        tables.row(name, each.tokens, f"{each.parameters / 1e6:.1f}", *cells, each.top1)
    theirs = version("transformers")
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, transformers {theirs}"
    tables.measured_on(
        f"{machine()}, {options.threads} threads; {versions}, Python {platform.python_version()}; backend "
        f"{active_backend('cpu')}; random weights, float32, {SIDE} x {SIDE} pixels."
    )


if __name__ == "__main__":
    main()
