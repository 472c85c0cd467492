"""Dense models pruned: what segmentation loses and gains, what a short training returns, and how detectors compare.

    python recipes/bench/segmentation.py [CKPT...] --data CAMVID [--keep 0.9 0.8 0.7 0.6] [--epochs 2] [--limit N]
        [--detection IMAGES] [--csv benchmarks/results/segmentation.csv]

prints Markdown tables, and with --csv FILE writes each beside it after every row. Without a checkpoint: those of
benchmarks/. CAMVID is a folder of images and masks, divided into train and test: models are judged on its test images,
which had no part in any choice, calibrated on and fine-tuned with the images of train.

pruned     reductions at equal keep ratios at the default points, and the smaller image that needs as many multiply-adds
           as `drop`; time is the dense model's in turn with it, a batch of --batch-size images of the model's own size
finetuned  --finetuned at --finetuned-keep before and after --epochs epochs, and the dense model trained for as long
features   with --detection: how far features of pruned models are from dense ones, of a segmenter and of a Mask R-CNN
           on the same encoder with random weights: squared error as a share of the square, of the encoder's maps and of
           the pyramid that a head makes of them. It says nothing of average precision

Intervals are of 95 %: of mIoU's change by a paired bootstrap over images, of time over turns; ± is one standard error.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import Subset, calibration_images, open_dataset
from ssmprune_cli.inference import Session
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import FAMILIES, Backbone, DenseModel, Detector, Segmenter, Size, sides
from ssmprune_cli.models.heads import MaskRCNNConfig, UperNet
from ssmprune_cli.preprocessing import KeepRatio
from ssmprune_cli.pruning import (
    Method,
    PruneSchedule,
    TokenPruner,
    choose_alignment,
    compress,
    relative_error,
    restore,
)
from ssmprune_cli.recipe import Training
from ssmprune_cli.statistics import ratio_of_medians
from ssmprune_cli.workflows.compare import Comparison
from ssmprune_cli.workflows.compare import Row as Compared
from ssmprune_cli.workflows.evaluate import evaluate, spread
from ssmprune_cli.workflows.finetune import Data, Job, finetune, some
from ssmprune_cli.workflows.measure import count_flops, interleaved_speeds, machine
from ssmprune_cli.workflows.source import Source
from ssmprune_cli.workflows.trials import Budget, Images, in_batches, load_images
from tables import Tables

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
REDUCTIONS = ("drop", "context", "frozen-pairs", "grid-merge")
SIDE = 256  # the short side of a detector's images: published ones have 800, and take ten times as long


class Bench:
    """The tables of one segmenter."""

    def __init__(self, path: Path, arguments: argparse.Namespace) -> None:
        self.path, self.arguments = path, arguments
        self.judged = open_dataset("segfolder", arguments.data / "images" / "test")
        self.training = open_dataset("segfolder", arguments.data, split="train")
        if arguments.limit is not None and arguments.limit < len(self.judged):
            self.judged = Subset(self.judged, spread(len(self.judged), arguments.limit))
        self.calibration = calibration_images(arguments.data / "images" / "train", arguments.calibration, 0)

    def pruned(self, tables: Tables) -> None:
        """A row for the dense model, and for every reduction and a smaller image at every keep ratio."""
        batch_size = self.arguments.batch_size
        comparison = Comparison(
            Source(self.path), self.judged, limit=None, batch_size=batch_size, device="cpu", rounds=1
        )
        images = load_images(comparison.model, self.calibration)
        encoder = comparison.dense_cost - count_flops(comparison.model).head

        def row(keep: str, name: str, found: Compared, model: Backbone, session: Session) -> None:
            both = [torch.zeros(batch_size, 3, *each.image_size) for each in (comparison.model, model)]
            dense, own = interleaved_speeds([comparison.reference, session], both, self.arguments.rounds)
            ratio, ends = ratio_of_medians(dense.rounds_ms, own.rounds_ms)
            cost = count_flops(model)
            change = "" if found.difference is None or name == "dense" else points(found.difference, found)
            tables.row(
                self.path.stem,
                keep,
                name,
                f"{100 * (found.metric or 0):.2f}",
                change,
                f"{ratio:.3f} ({ends[0]:.3f} to {ends[1]:.3f})",
                f"{(cost.all_directions - cost.head) / encoder:.3f}",
                f"{cost.all_directions / comparison.dense_cost:.3f}",
                f"{found.divergence or 0:.4f}",
            )

        row("1", "dense", comparison.dense(), comparison.model, comparison.reference)
        for keep in self.arguments.keep:
            work = 0.0
            for reduction in REDUCTIONS:
                method, model = usual(reduction), comparison.model
                schedule = PruneSchedule.resolve(model.stages, keep=keep, rectangular=method.rectangular)
                settings = method.settings(schedule, 0)
                found = comparison.pruned(str(method), "", settings, images)
                model.pruner = TokenPruner(settings, model.stages, model.mixers)  # not calibrated, it costs the same
                row(f"{keep:g}", str(method), found, model, comparison.reference.with_pruner(model.pruner))
                work = work or found.multiply_adds
                restore(model)
            possible = [Size(side) for side in sides(comparison.model)]
            size = comparison.size_for(possible, Budget("flops", keep), work)
            if size is not None:
                small, title = comparison.at(size), f"smaller image, {size}"
                row(f"{keep:g}", title, comparison.smaller(title, "", size), small.model, small.session)

    def finetuned(self, tables: Tables) -> None:
        """A row for every reduction at one keep ratio, before and after training, and one for the dense model."""
        keep = self.arguments.finetuned_keep
        images = load_images(checkpoint.load(self.path), self.calibration)
        for reduction in ("none", *self.arguments.finetuned):
            model, dense = checkpoint.load(self.path), checkpoint.load(self.path)
            if reduction != "none":
                alignment = usual(reduction).alignment
                compress(model, keep, reduction=reduction, alignment=alignment, calibration=images, repair="none")
            before = self.miou(model, dense)
            after = self.miou(self.trained(model), dense)
            tables.row(
                self.path.stem,
                "1" if reduction == "none" else f"{keep:g}",
                "dense" if reduction == "none" else str(usual(reduction)),
                str(self.arguments.epochs),
                f"{100 * before.miou:.2f}",
                points(before.difference, before),
                f"{100 * after.miou:.2f}",
                points(after.difference, after),
            )

    def trained(self, model: Backbone) -> Backbone:
        settings = Training(
            epochs=self.arguments.epochs,
            batch_size=8,
            lr=self.arguments.lr,
            warmup_epochs=0.2,
            label_smoothing=0.0,
            crop_scale=0.4,
            flip=True,
            colour_jitter=0.2,
        )
        with tempfile.TemporaryDirectory() as folder:
            data = Data(some(self.training, self.arguments.train_limit, 0))
            result = finetune(model, data, Job(settings, 0, " ".join(sys.argv)), Path(folder) / "out")
            if result.interrupted or result.last is None:
                raise SystemExit("interrupted")
            return checkpoint.load(result.last)

    def miou(self, model: Backbone, dense: Backbone) -> Any:
        """Facts of `model` on the judged images, and of the change from the `dense` one."""
        return evaluate(model, self.judged, compare=dense).comparison

    def features(self, tables: Tables, photographs: Path) -> None:
        """Rows of how far the feature maps of pruned models are from the dense ones'."""
        trained = checkpoint.load(self.path)
        assert isinstance(trained, Segmenter)
        judged = Subset(self.judged, spread(len(self.judged), min(len(self.judged), self.arguments.feature_images)))
        scenes, calibration = load_images(trained, judged), load_images(trained, self.calibration)
        torch.manual_seed(0)
        random, detector = FAMILIES.get(trained.family).build(trained.config).eval(), mask_rcnn(trained)
        assert isinstance(random, Segmenter)
        half = self.arguments.feature_images
        found = calibration_images(photographs, 2 * half, 0)
        photos = load_images(detector, found)
        rows: list[tuple[str, str, DenseModel, Images, Images]] = [
            ("UperNet, trained", "camvid, test", trained, calibration, scenes),
            ("UperNet, random weights", "camvid, test", random, calibration, scenes),
            ("Mask R-CNN, random weights", photographs.name, detector, photos[:half], photos[half:]),
        ]
        for title, name, model, known, unseen in rows:
            for keep in self.arguments.keep:
                for reduction in ("drop", "grid-merge"):
                    errors = feature_errors(model, keep, reduction, in_batches(known, 1), in_batches(unseen, 1))
                    tables.row(title, f"{name}, {len(unseen)}", f"{keep:g}", reduction, *map(plus_minus, errors))


def usual(reduction: str) -> Method:
    """With the paper's score and the alignment that it has by default."""
    return Method("clip", reduction, choose_alignment("auto", reduction, calibrated=True))


def points(difference: float, found: Any) -> str:
    """The change of mIoU in points, with its interval."""
    low, high = found.difference_interval
    return f"{100 * difference:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def mask_rcnn(segmenter: Segmenter) -> DenseModel:
    """A detector on the encoder of `segmenter`, all its weights random."""
    family = FAMILIES.get("vmamba-maskrcnn")
    encoder = segmenter.config.encoder
    images = KeepRatio(2 * SIDE, SIDE, 32, "pad")
    config = family.config_class(
        encoder=encoder, head=MaskRCNNConfig(in_channels=encoder.map_channels), preprocessing=images
    )
    torch.manual_seed(0)
    detector = family.build(config.with_images(images)).eval()
    assert isinstance(detector, Detector)
    return detector


@torch.inference_mode()
def feature_errors(
    model: DenseModel, keep: float, reduction: str, calibration: Sequence[Tensor], images: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Relative errors (images,) of the encoder's maps and of the pyramid, each the mean over its levels."""
    restore(model)
    dense = [levels(model, batch) for batch in images]
    alignment = usual(reduction).alignment
    compress(model, keep, reduction=reduction, alignment=alignment, calibration=calibration, repair="none")
    pruned = [levels(model, batch) for batch in images]
    restore(model)

    def errors(place: int) -> Tensor:
        pairs = [zip(one[place], other[place], strict=True) for one, other in zip(dense, pruned, strict=True)]
        return torch.stack([torch.cat([relative_error(*level) for level in pair]).mean() for pair in pairs])

    return errors(0), errors(1)


def levels(model: DenseModel, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The encoder's maps, and what the head makes of them before it tells classes or boxes."""
    maps, head = model.encoder.feature_maps(images), model.head
    if isinstance(head, UperNet):
        return maps, [head.features(maps)]
    return maps, head(maps)[:-1]  # the last level is made of the one before


def plus_minus(values: Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std()) / len(values) ** 0.5:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual_files = sorted(BENCHMARKS.glob("*_camvid.pth"))
    parser.add_argument("checkpoints", type=Path, nargs="*", default=usual_files)
    parser.add_argument("--data", type=Path, required=True, help="images/ and annotations/, each with train/ and test/")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.9, 0.8, 0.7, 0.6])
    parser.add_argument("--limit", type=int, help="judge on so many test images, always the same")
    parser.add_argument("--calibration", type=int, default=64, help="images of train that models are calibrated on")
    parser.add_argument("--batch-size", type=int, default=8, help="images that are timed at once")
    parser.add_argument("--rounds", type=int, default=9, help="timed turns of a row")
    parser.add_argument("--finetuned", nargs="*", default=["drop", "grid-merge"], help="reductions")
    parser.add_argument("--finetuned-keep", type=float, default=0.7)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--train-limit", type=int, help="fine-tune with so many images")
    parser.add_argument("--detection", type=Path, help="photographs, such as val2017/ of COCO")
    parser.add_argument("--feature-images", type=int, default=16, help="images of the table of feature maps")
    parser.add_argument("--csv", type=Path, help="write each table beside it: FILE_pruned.csv, ...")
    arguments = parser.parse_args()
    tables = Tables(arguments.csv)
    benches = [Bench(path, arguments) for path in arguments.checkpoints]
    costs = (f"time, batch of {arguments.batch_size}", "multiply-adds, backbone", "multiply-adds, all")
    tables.start("", "checkpoint", "keep", "method", "mIoU %", "change, points", *costs, "nats")
    for bench in benches:
        bench.pruned(tables)
    versions = f"ssmprune {ssmprune_cli.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    where = f"{versions}, {machine('cpu')}, {torch.get_num_threads()} threads, backend {active_backend('cpu')}"
    judged = f"{len(benches[0].judged)} test images"
    tables.measured_on(f"{judged}; {where}; 95 % intervals in brackets.")
    if arguments.finetuned:
        titles = (title for when in ("before", "after") for title in (f"{when} %", f"{when}, change"))
        tables.start("finetuned", "checkpoint", "keep", "method", "epochs", *titles)
        for bench in benches:
            bench.finetuned(tables)
    if arguments.detection is not None:
        tables.start("features", "model", "images", "keep", "reduction", "encoder's maps", "pyramid")
        for bench in benches:
            if checkpoint.load(bench.path).family == "vmamba-upernet":
                bench.features(tables, arguments.detection)
    tables.measured_on(f"{judged}; {where}; 95 % intervals in brackets; ± is one standard error.")


if __name__ == "__main__":
    main()
