"""Where a checkpoint is, which files it is made of, and their checksum."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ssmprune_cli.checkpoint import hub
from ssmprune_cli.errors import CheckpointError, shown
from ssmprune_cli.files import open_regular, read_bytes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DENSE = "dense.safetensors"  # of an artefact: the dense model's weights where they are others
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
MAX_JSON = 1 << 23  # bytes of a config.json or an index
_ADDRESSES = (hub.SCHEME, "http:", "https:", "s3:", "gs:")


def locate(path: Path) -> Path:
    """`path` with `~` for the home folder; of an address on the hub, where its file is once it is downloaded.
    CheckpointError for another address, which nothing is downloaded from, and for what goes wrong with the hub."""
    if _is_address(path):
        if str(path).startswith(hub.SCHEME):
            return hub.fetched(hub.parse(str(path)))[0]
        on_hub = hub.from_page(str(path))
        raise CheckpointError(
            "is an address, and ssmprune downloads from the hub only",
            where=str(path),
            hint=f"Type {on_hub}." if on_hub else "Download the file first, and give its path.",
        )
    if str(path).startswith("~") and not os.path.lexists(path):
        try:
            return path.expanduser()
        except RuntimeError:  # no home folder is known
            return path
    return path


def folder_of(path: Path) -> Path:
    """The folder that the file or folder at `path` is in, or is: where a tokenizer may lie beside the weights."""
    path = locate(path)
    return path if path.is_dir() else path.parent


def _is_address(path: Path) -> bool:
    return str(path).startswith(_ADDRESSES) and not os.path.lexists(path)


def hub_address(path: Path) -> str | None:
    """What an address on the hub stands for now, with the commit in it; None for a file of this machine."""
    if not _is_address(path) or not str(path).startswith(hub.SCHEME):
        return None
    return str(hub.fetched(hub.parse(str(path)))[1])


def read_json(path: Path) -> Any:
    """The value in a JSON file. CheckpointError for whatever keeps it from being read."""
    content = read_bytes(path, MAX_JSON, CheckpointError)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of text, JSON, numbers of thousands of digits, nesting
        raise CheckpointError(f"cannot be read: {shown(str(error))}", where=str(path)) from error


def shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    """Of a sharded checkpoint: the file of every weight, and all files. CheckpointError if the index is none."""
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(each, str) for each in names.values()):
        raise CheckpointError("is JSON, but not the index of a sharded checkpoint", where=str(index))
    files = sorted(set(names.values()))
    for name in files:
        if name != Path(name).name or name in ("", ".", ".."):
            raise CheckpointError(f"names a file outside its folder: {shown(name)}", where=str(index))
    return names, [index.with_name(name) for name in files]


def parts(path: Path) -> list[Path]:
    """The files that make up the checkpoint at `path`: itself, or those of a folder or an index that hold the model."""
    path = locate(path)
    if not path.is_dir():
        return [path, *shards(path)[1]] if path.name.endswith(".index.json") else [path]
    for name in INDEXES:
        if not (path / WEIGHTS).exists() and (path / name).exists():
            return [path / CONFIG, path / name, *shards(path / name)[1]]
    weights = path / WEIGHTS
    other = path / "pytorch_model.bin"
    if other.exists() and not weights.exists():
        return [path / CONFIG, other]
    return [path / CONFIG, weights, *([path / DENSE] if (path / DENSE).exists() else [])]


def size(path: Path) -> int:
    """Bytes of the files of a checkpoint; of an artefact, config.json and all weights."""
    return sum(part.stat().st_size for part in parts(path))


def sha256(path: Path) -> str:
    """SHA-256 in hex of the files of a checkpoint, one after another: of an artefact, config.json and all weights."""
    digest = hashlib.sha256()
    for part in parts(path):
        with open_regular(part, CheckpointError) as file:
            try:
                while block := file.read(1 << 20):
                    digest.update(block)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=str(part)) from error
    return digest.hexdigest()
