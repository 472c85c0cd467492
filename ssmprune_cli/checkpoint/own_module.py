"""Output folders of a user's own module: `model.safetensors` with the keys that the module itself has, what was
calibrated, and a config.json. What builds the module is code of the user's, and is not in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialize
from torch import Tensor

from ssmprune_cli.checkpoint.artefact import MODULE_FORMAT, check_writable, write
from ssmprune_cli.checkpoint.files import CONFIG, WEIGHTS, locate, read_json
from ssmprune_cli.checkpoint.replacing import recover
from ssmprune_cli.checkpoint.stored import read_safetensors
from ssmprune_cli.errors import CheckpointError

VERSION = 1
CALIBRATED = "calibrated.safetensors"


@dataclass(frozen=True)
class OwnModule:
    """What such a folder holds.

    module      by which name it was built: for messages only
    inside      how tokens are dropped, as plain values
    images      how images are prepared, as plain values
    state       weights by name
    calibrated  tensors of the pruner by name
    """

    module: str
    inside: dict[str, Any]
    images: dict[str, Any]
    state: dict[str, Tensor]
    calibrated: dict[str, Tensor]


def is_own_module(path: Path) -> bool:
    """Whether `path` is such a folder."""
    folder = locate(path)
    recover(folder)
    if not (folder / CONFIG).is_file():
        return False
    values = read_json(folder / CONFIG)
    return isinstance(values, dict) and values.get("format") == MODULE_FORMAT


def read_own_module(path: Path) -> OwnModule:
    """What is in such a folder. Raises CheckpointError for one that is damaged."""
    folder = locate(path)
    values = read_json(folder / CONFIG)
    if values.get("format_version") != VERSION:
        raise CheckpointError(
            f"has format version {values.get('format_version')}, and this ssmprune reads version {VERSION}",
            where=str(folder / CONFIG),
            hint="Use the ssmprune that wrote it, or a newer one.",
        )
    module, inside, images = (values.get(key) for key in ("module", "inside", "images"))
    if not (isinstance(module, str) and isinstance(inside, dict) and isinstance(images, dict)):
        raise CheckpointError("`module`, `inside` or `images` is missing or damaged", where=str(folder / CONFIG))
    state, calibrated = (read_safetensors(folder / name)[0] for name in (WEIGHTS, CALIBRATED))
    return OwnModule(module, inside, images, state, calibrated)


def save_own_module(
    folder: Path, content: OwnModule, extra_files: Mapping[str, bytes | str], *, overwrite: bool = False
) -> None:
    """Write `content` and `extra_files` to `folder`: all of it or nothing. The same gives the same bytes.

    Raises CheckpointError if `check_writable` does, or if the disk is full.
    """
    check_writable(folder, overwrite=overwrite)
    config = {
        "format": MODULE_FORMAT,
        "format_version": VERSION,
        "module": content.module,
        "inside": content.inside,
        "images": content.images,
    }
    files = {
        **extra_files,
        CONFIG: json.dumps(config, indent=1) + "\n",
        WEIGHTS: _serialized(content.state),
        CALIBRATED: _serialized(content.calibrated),
    }
    write(folder, files)


def _serialized(tensors: Mapping[str, Tensor]) -> bytes:
    """Each with values of its own: of tied weights both are written."""
    own = {name: value.detach().cpu().clone().contiguous() for name, value in sorted(tensors.items())}
    return serialize(own, metadata={"format": "pt"})
