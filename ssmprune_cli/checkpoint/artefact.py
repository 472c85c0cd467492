"""Our own output folders: `model.safetensors`, a `config.json` that says how to build it, and what a workflow adds."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as serialize
from torch import Tensor

from ssmprune_cli.checkpoint.files import CONFIG, DENSE, WEIGHTS, locate, read_json
from ssmprune_cli.checkpoint.hub import MADE_SMALLER
from ssmprune_cli.checkpoint.replacing import probe, recover, write_folder
from ssmprune_cli.errors import CheckpointError, shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner

FORMAT, FORMAT_VERSION = "ssmprune", 1
EIGHT_BITS = "eight_bits"  # in config.json: the kinds of linear layers whose weights are; not there if there are none
MODULE_FORMAT = "ssmprune module"  # of a user's own module, see own_module.py


@dataclass(frozen=True)
class Artefact:
    """What a config.json says: the family and its config as plain values, the pruner's settings if there is one, and
    which kinds of linear layers are in eight bits."""

    family: str
    config: dict[str, Any]
    pruning: dict[str, Any] | None
    eight_bits: tuple[str, ...] = ()


def read_config(folder: Path) -> Artefact:
    """The config.json of an artefact folder. Raises CheckpointError if it is none of ours."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise CheckpointError(
            f"a folder without {CONFIG} is no output of ssmprune",
            where=str(folder),
            hint="Give the checkpoint file itself.",
        )
    values = read_json(path)
    if isinstance(values, dict) and values.get("format") == MODULE_FORMAT:
        raise CheckpointError(
            "holds the weights of a module that is none of ours",
            where=str(folder),
            hint=f"Give `--module {shown(str(values.get('module')))}`, which it was made with, to compress, eval or "
            "profile: that runs the code behind the name.",
        )
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"is not a {CONFIG} of ssmprune", where=str(path), hint="Give the checkpoint file in the folder itself."
        )
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"has format version {values.get('format_version')}, and this ssmprune reads version {FORMAT_VERSION}",
            where=str(path),
            hint="Use the ssmprune that wrote it, or a newer one.",
        )
    family, config, pruning = (values.get(key) for key in ("family", "config", "pruning"))
    if not (isinstance(family, str) and isinstance(config, dict) and isinstance(pruning, dict | None)):
        raise CheckpointError("`family`, `config` or `pruning` is missing or damaged", where=str(path))
    eight_bits = values.get(EIGHT_BITS, [])
    if not (isinstance(eight_bits, list) and all(isinstance(each, str) for each in eight_bits)):
        raise CheckpointError(f"`{EIGHT_BITS}` is no list of kinds of layers", where=str(path))
    return Artefact(family, config, pruning, tuple(eight_bits))


def is_compressed(path: Path) -> bool:
    """Whether `path` is an artefact folder of a model that drops tokens, was made smaller or is in eight bits. Raises
    CheckpointError if its config.json is damaged."""
    path = locate(path)
    if _format(path) != FORMAT:
        return False
    said = read_config(path)
    smaller = any(said.config.get(name) is not None for name in MADE_SMALLER)
    return said.pruning is not None or bool(said.eight_bits) or smaller


def _format(folder: Path) -> object:
    """What the config.json of a folder says that it is; None for one without."""
    values = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else None
    return values.get("format") if isinstance(values, dict) else None


def _state(model: Backbone) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in sorted(model.state_dict().items())}


def check_writable(folder: Path, *, overwrite: bool = False) -> None:
    """CheckpointError unless `save` can and may write `folder`: only an earlier output of ours is ever replaced."""
    recover(folder)
    try:
        probe(folder)
    except OSError as error:
        raise CheckpointError(f"cannot be written: {error.strerror or error}", where=str(folder)) from error
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError("is a file, not a folder", where=str(folder))
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(
            "the folder is not empty", where=str(folder), hint="Choose another folder, or give `--overwrite`."
        )
    try:
        if _format(folder) != MODULE_FORMAT:
            read_config(folder)
    except CheckpointError as error:
        raise CheckpointError(
            "the folder holds something else than an output of ssmprune, so it is not overwritten",
            where=str(folder),
            hint="Choose another folder.",
        ) from error


def save(
    folder: Path,
    model: Backbone,
    extra_files: Mapping[str, bytes | str] | None = None,
    *,
    dense: Backbone | None = None,
    overwrite: bool = False,
) -> None:
    """Write `model`, with its pruner, and `extra_files` (name to content) to `folder`: all of it or nothing.

    dense  what a `model` that was resized or cut short was made of: its weights that are others go into the folder too,
           so that it can be compressed again from there. Not if `model` is in eight bits: that is final

    The same model gives the same bytes. Raises CheckpointError if `check_writable` does, or if the disk is full.
    """
    check_writable(folder, overwrite=overwrite)
    settings = model.pruner.settings.to_dict() if isinstance(model.pruner, TokenPruner) else None
    config = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "family": model.family,
        "config": asdict(model.config),
        "pruning": settings,
    }
    if model.eight_bit_kinds:
        config[EIGHT_BITS] = list(model.eight_bit_kinds)
    state = _state(model)
    files: dict[str, bytes | str] = {
        **(extra_files or {}),
        CONFIG: json.dumps(config, indent=1) + "\n",
        WEIGHTS: serialize(state, metadata={"format": "pt"}),
    }
    if dense is not None and dense.config != model.config and not model.eight_bit_kinds:
        others = {
            name: value
            for name, value in _state(dense).items()
            if name not in state or not torch.equal(state[name], value)
        }
        files[DENSE] = serialize(others, metadata={"format": "pt"})
    write(folder, files)


def weights_size(model: Backbone) -> int:
    """Bytes of the file of weights that `save` writes of `model`, with what its pruner holds."""
    return len(serialize(_state(model), metadata={"format": "pt"}))


def write(folder: Path, files: Mapping[str, bytes | str]) -> None:
    """Make `folder` a folder of these files, in one step. CheckpointError if it cannot be."""
    contents = {name: text.encode() if isinstance(text, str) else text for name, text in files.items()}
    try:
        write_folder(folder, contents)
    except OSError as error:
        what = f"cannot be written: {error.strerror or error}"
        if error.errno == errno.ENOSPC:
            what = f"the disk is full; writing needs {sum(map(len, contents.values())) / 1e6:.1f} MB"
        raise CheckpointError(what, where=str(folder)) from error
