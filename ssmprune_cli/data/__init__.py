"""What images and texts are: datasets by name, preprocessing, batches. A dataset is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ssmprune_cli.data.ade20k import is_ade20k, open_ade20k
from ssmprune_cli.data.calibration import calibration_images, differing, fingerprint, listed_images, some_images
from ssmprune_cli.data.cifar import open_cifar10, open_cifar100
from ssmprune_cli.data.clips import listed_clips, sampled
from ssmprune_cli.data.coco import Annotation, Objects, open_coco
from ssmprune_cli.data.datasets import ImageDataset, Joined, Split, Subset, Target, chosen, unprepared
from ssmprune_cli.data.imagefolder import open_imagefolder
from ssmprune_cli.data.imagenet import open_imagenet
from ssmprune_cli.data.kinetics import open_kinetics
from ssmprune_cli.data.loader import Batch, batches
from ssmprune_cli.data.masks import NOT_JUDGED
from ssmprune_cli.data.npz import open_npz
from ssmprune_cli.data.preprocess import framed, in_colour, normalised, prepare_image, to_rgb, visible_box
from ssmprune_cli.data.segfolder import open_segfolder
from ssmprune_cli.data.text import Texts, TextWindows, open_text
from ssmprune_cli.data.tokenizer import TOKENIZER, encoder, read_tokenizer
from ssmprune_cli.errors import UsageError
from ssmprune_cli.registry import Registry

DATASETS: Registry[Callable[[Path, Split], ImageDataset | Texts]] = Registry("dataset")
DATASETS.register("imagenet", open_imagenet)
DATASETS.register("imagefolder", open_imagefolder)
DATASETS.register("cifar10", open_cifar10)
DATASETS.register("cifar100", open_cifar100)
DATASETS.register("npz", open_npz)
DATASETS.register("ade20k", open_ade20k)
DATASETS.register("segfolder", open_segfolder)
DATASETS.register("coco", open_coco)
DATASETS.register("kinetics", open_kinetics)
DATASETS.register("text", open_text)


def open_dataset(name: str, root: Path, *, split: Split = "val") -> ImageDataset:
    """The images with targets in `root` (a folder, or a file for npz), laid out as the dataset kind `name` says.

    split  which part of a divided dataset; "val" are the images to evaluate on, whatever the dataset calls them

    Raises UsageError for an unknown kind, and for text, which a model's tokenizer divides (see `open_text`); DataError
    for data that is not laid out so.
    """
    opened = DATASETS.get(name)(root, split)
    if isinstance(opened, Texts):
        raise UsageError("a text is read by the tokenizer of a model, so give the model too", where=str(root))
    return opened


__all__ = [
    "DATASETS",
    "NOT_JUDGED",
    "TOKENIZER",
    "Annotation",
    "Batch",
    "ImageDataset",
    "Joined",
    "Objects",
    "Split",
    "Subset",
    "Target",
    "TextWindows",
    "Texts",
    "batches",
    "calibration_images",
    "chosen",
    "differing",
    "encoder",
    "fingerprint",
    "framed",
    "in_colour",
    "is_ade20k",
    "listed_clips",
    "listed_images",
    "normalised",
    "open_dataset",
    "open_text",
    "prepare_image",
    "read_tokenizer",
    "sampled",
    "some_images",
    "to_rgb",
    "unprepared",
    "visible_box",
]
