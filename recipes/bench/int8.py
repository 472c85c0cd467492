"""Weights in eight bits and token pruning, apart and together: accuracy, divergence, size and time on this CPU.

    python recipes/bench/int8.py CKPT... --data-dir DIR --calib DIR [--keep 0.6] [--limit 1000] [--csv FILE]

prints a Markdown table, and with --csv FILE writes it too. Of each checkpoint four models: all tokens and pruned, in
float and in eight bits. A pruned model has one repair in both forms, fitted to the --calib images in eight bits.
"nats" is the mean divergence from the dense model in float on the --data-dir images, "same" the share of them with the
same answer as the same model in float; the change of top-1 is against that too, ± one standard error of paired
differences. Times are medians and quartiles of rounds in which all four take turns in one process.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli.data import ImageDataset, Subset, calibration_images, open_dataset
from ssmprune_cli.inference import prepare
from ssmprune_cli.kernels import active_backend, pick
from ssmprune_cli.models import Backbone, set_layer
from ssmprune_cli.pruning import ALIGNMENT_IMAGES, compress, divergence, paired, repair
from ssmprune_cli.workflows.compress.savings import stored_bytes
from ssmprune_cli.workflows.eight_bits import to_eight_bits
from ssmprune_cli.workflows.evaluate import spread
from ssmprune_cli.workflows.measure import interleaved_speeds, machine
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Prepared, run
from tables import Tables

TITLES = (
    "checkpoint",
    "tokens",
    "weights",
    "MB",
    "top-1 %",
    "change, points",
    "nats",
    "same %",
    "ms, batch 1",
    "ms, batch 8",
)
Models = dict[tuple[str, str], Backbone]


def make(source: Source, images: Prepared, few: Tensor, keep: float) -> tuple[Models, tuple[str, ...]]:
    """The four models, by tokens and weights, and which kinds of layers are in eight bits."""
    dense = source.load()
    rounded = copy.deepcopy(dense)
    kinds = to_eight_bits(rounded, few.split(16)).chosen
    pruned = copy.deepcopy(dense)
    compress(pruned, keep, calibration=few, repair="none")
    pruned_rounded = copy.deepcopy(pruned)
    to_eight_bits(pruned_rounded, few.split(16), kinds)
    with torch.inference_mode():
        logits = run(prepare(dense), images)
    repair(pruned_rounded, images, runner=prepare(pruned_rounded).with_pruner, dense=logits)
    pruned.pruner = copy.deepcopy(pruned_rounded.pruner)
    for name in pruned.layers_of(kinds):
        set_layer(pruned, name, copy.deepcopy(dense.get_submodule(name)))
    models = {
        ("all", "float"): dense,
        ("all", "int8"): rounded,
        (f"keep {keep:g}", "float"): pruned,
        (f"keep {keep:g}", "int8"): pruned_rounded,
    }
    return models, kinds


def rows(path: Path, arguments: argparse.Namespace, tables: Tables) -> None:
    """The four models of one checkpoint."""
    source = Source(path)
    calibration = calibration_images(arguments.calib, arguments.calib_images, 0)
    reference = source.load()
    images = Prepared(reference, calibration, 64)
    few_rows = spread(len(calibration), min(ALIGNMENT_IMAGES, len(calibration)))
    few = torch.cat(list(Prepared(reference, Subset(calibration, few_rows), 64)))
    models, kinds = make(source, images, few, arguments.keep)
    data: ImageDataset = open_dataset(arguments.dataset, arguments.data_dir)
    if arguments.limit < len(data):
        data = Subset(data, spread(len(data), arguments.limit))
    labels = torch.tensor([data.target(index) for index in range(len(data))])
    sessions = {key: prepare(model) for key, model in models.items()}
    logits = {key: run(session, Prepared(reference, data, 64)) for key, session in sessions.items()}
    times = []
    for batch in (1, 8):
        speeds = interleaved_speeds(
            list(sessions.values()), torch.zeros(batch, 3, *reference.image_size), arguments.rounds
        )
        times.append(["{:.2f} ({:.2f} to {:.2f})".format(each.median_ms, *each.quartiles_ms) for each in speeds])
    dense = logits["all", "float"]
    for number, ((tokens, weights), found) in enumerate(logits.items()):
        in_float = logits[tokens, "float"]
        right, before = (100 * (each.argmax(dim=1) == labels).double() for each in (found, in_float))
        change, error = paired(right, before)
        tables.row(
            path.stem,
            tokens,
            weights,
            f"{stored_bytes(models[tokens, weights]) / 1e6:.2f}",
            f"{float(right.mean()):.2f}",
            "" if weights == "float" else f"{change:+.2f} ± {error if math.isfinite(error) else 0:.2f}",
            f"{float(divergence(dense, found).mean()):.5f}",
            f"{100 * float((found.argmax(dim=1) == in_float.argmax(dim=1)).double().mean()):.2f}",
            *(each[number] for each in times),
        )
    print(f"{path.name}: in eight bits are {', '.join(kinds) or 'none'}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--dataset", default="imagefolder")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--calib-images", type=int, default=1024)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    tables = Tables(arguments.csv)
    tables.start("int8", *TITLES)
    for path in arguments.checkpoints:
        rows(path, arguments, tables)
    dots = "with" if pick(torch.empty(0), 1).has_dots() else "without"
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    tables.measured_on(
        f"{versions}, {machine('cpu')}, {torch.get_num_threads()} threads, backend {active_backend('cpu')} {dots} an "
        f"instruction for products of bytes; times are medians of {arguments.rounds} rounds (quartiles)."
    )


if __name__ == "__main__":
    main()
