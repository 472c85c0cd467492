"""ImageNet-1k (ILSVRC2012) in its usual layouts. Classes are numbered by sorted WordNet id."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ssmprune_cli.data.datasets import ImageFiles, Split, check_folder, image_files, subfolders
from ssmprune_cli.data.imagefolder import labelled_folders
from ssmprune_cli.errors import DataError

_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_IMAGES = 50_000  # in the whole validation set


def devkit_wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids in the order of ILSVRC2012_ID, 1 to 1000, in the development kit's meta.mat."""
    return tuple(resources.files("ssmprune_cli.data").joinpath("imagenet_wnids.txt").read_text("ascii").split())


def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids, sorted: the class of index i is the i-th of them."""
    return tuple(sorted(devkit_wnids()))


def open_imagenet(root: Path, split: Split) -> ImageFiles:
    """The images in `root`/`split` or `root`, labelled by folder or, if of "val", by a list. Part of them is enough.

    Folders are named by WordNet id. A flat folder of ILSVRC2012_val_*.JPEG needs, in it or in `root`, either `val.txt`
    (lines "name index" or "name wnid") or the official ILSVRC2012_validation_ground_truth.txt, whose ids are in the
    development kit's order and not in that of the sorted WordNet ids.

    Raises DataError for an unknown WordNet id, a missing list, or an image that the list lacks.
    """
    check_folder(root)
    folder = root / split if (root / split).is_dir() else root
    names = wnids()
    index = {wnid: number for number, wnid in enumerate(names)}
    classes = [path.name for path in subfolders(folder)]
    if classes:
        unknown = [name for name in classes if name not in index]
        if unknown:
            raise DataError(
                f"{unknown[0]!r} is no WordNet id of ImageNet-1k",
                where=str(folder),
                hint="Expected val/<wnid>/*.JPEG. For folders with other names use `--dataset imagefolder`.",
            )
        return labelled_folders(folder, index, list(names))
    files = [path for path in image_files(folder) if _NAME.fullmatch(path.stem)]
    if not files:
        raise DataError("has neither folders named by WordNet id nor images ILSVRC2012_val_*.JPEG", where=str(folder))
    return ImageFiles(folder, files, _listed(root, folder, files, index), names)


def _listed(root: Path, folder: Path, files: list[Path], index: dict[str, int]) -> list[int]:
    """The label of each of `files` by the list that is there."""
    chosen = _find("val.txt", root, folder)
    if chosen is not None:
        labels = _val_list(chosen, index)
    else:
        chosen = _find(_TRUTH, root, folder)
        if chosen is None:
            raise DataError(
                "has images but no labels for them",
                where=str(folder),
                hint=f'Put {_TRUTH} of the development kit or val.txt (lines "name index" or "name wnid") beside them.',
            )
        labels = _ground_truth(chosen, index)
    missing = [path.name for path in files if path.stem not in labels]
    if missing:
        raise DataError(f"does not list {missing[0]} ({len(missing)} images are not listed)", where=str(chosen))
    return [labels[path.stem] for path in files]


def _find(name: str, *folders: Path) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read: {error}", where=str(path)) from error


def _val_list(path: Path, index: dict[str, int]) -> dict[str, int]:
    """Label by file stem."""
    labels = {}
    for number, line in enumerate(_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        label = _class_index(words[1], index) if len(words) == 2 else None
        if label is None:
            raise DataError(
                f'"{line}" is not "name index" (0 to 999) or "name wnid"',
                where=f"{path}, line {number}",
            )
        labels[Path(words[0]).stem] = label
    return labels


def _class_index(word: str, index: dict[str, int]) -> int | None:
    if word.isdecimal() and int(word) < len(index):
        return int(word)
    return index.get(word)


def _ground_truth(path: Path, index: dict[str, int]) -> dict[str, int]:
    """Label by file stem: line n is about image n, and has an ILSVRC2012_ID."""
    lines = _lines(path)
    if len(lines) != _IMAGES:
        raise DataError(
            f"has {len(lines):,} lines, not the {_IMAGES:,} of ILSVRC2012",
            where=str(path),
            hint='For a part of the images give val.txt (lines "name index" or "name wnid").',
        )
    order = devkit_wnids()
    labels = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip().isdecimal() or not 1 <= int(line) <= len(order):
            raise DataError(f'"{line}" is no id from 1 to {len(order)}', where=f"{path}, line {number}")
        labels[f"ILSVRC2012_val_{number:08d}"] = index[order[int(line) - 1]]
    return labels
