"""From a file or folder to named tensors: containers, prefixes, refusals that say what to do. Runs no pickled code."""

from __future__ import annotations

import argparse
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssmprune_cli.checkpoint.artefact import WEIGHTS, Artefact, read_config
from ssmprune_cli.errors import CheckpointError, UsageError
from ssmprune_cli.models import Hints

# Where training codes put the weights and their moving average; the first name that a container has is taken.
_COPIES = {"model": ("model", "state_dict"), "model_ema": ("model_ema", "state_dict_ema")}
_PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, as it was stored.

    kind      "torch", "torch (legacy)", "safetensors" or "ssmprune folder"
    entries   top-level names of the container; empty if the file is a bare state dict
    used      the entry that `state` comes from; None for a bare state dict
    state     weights by name, wrapper prefixes removed, in their stored types
    hints     what the container says beside the weights
    artefact  contents of config.json for one of our folders
    """

    path: Path
    kind: str
    entries: tuple[str, ...]
    used: str | None
    state: dict[str, Tensor]
    hints: Hints
    artefact: Artefact | None = None


def read(path: Path, *, weights: str = "model") -> Checkpoint:
    """Read a checkpoint file or one of our folders.

    weights  which copy to take from a container that has several: "model" or "model_ema"

    Raises CheckpointError for whatever is not a checkpoint or not safe to read, UsageError for unknown `weights`.
    """
    if weights not in _COPIES:
        raise UsageError(f"unknown weights {weights!r}", hint=f"Known: {', '.join(_COPIES)}.")
    if path.is_dir():
        artefact = read_config(path)
        content = _read_safetensors(path / WEIGHTS)
        return Checkpoint(path, "ssmprune folder", (), None, content, Hints(filename=path.name), artefact)
    kind = _sniff(path)
    content = _read_safetensors(path) if kind == "safetensors" else _read_torch(path, mmap=kind == "torch")
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights by name", where=str(path))
    used, found = _choose_copy(path, content, weights)
    return Checkpoint(
        path=path,
        kind=kind,
        entries=() if used is None else tuple(map(str, content)),
        used=used,
        state=_named_tensors(path, found),
        hints=_hints(path, content.get("args"), content.get("config")),
    )


def _sniff(path: Path) -> str:
    """The kind of a file from its first bytes. Raises CheckpointError for what is no checkpoint."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file or folder", where=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    header = int.from_bytes(head[:8], "little")
    if head.startswith(b"PK\x03\x04"):
        return _sniff_zip(path)
    if len(head) > 8 and head[8:9] == b"{" and header < 1 << 30:
        if 8 + header > size:
            raise _damaged(path)
        return "safetensors"
    if head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5:
        return "torch (legacy)"
    hint = "Expected a PyTorch checkpoint (.pth, .pt, .bin), a .safetensors file or an output folder of ssmprune."
    if not head:
        what = "the file is empty"
    elif head.startswith(b"version https://git-lfs"):
        what, hint = "is a Git LFS pointer, not the weights themselves", "Run `git lfs pull` where it was cloned."
    elif re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        what, hint = "is a web page, not a checkpoint", "Download it again with the link of the file itself."
    elif head.startswith(b"\x1f\x8b") or head[257:262] == b"ustar":
        what, hint = "is a packed archive", "Unpack it and give the checkpoint inside."
    elif re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        what = "is a text file, not a checkpoint"
    else:
        what = "is not a checkpoint of a known format"
    raise CheckpointError(what, where=str(path), hint=hint)


def _sniff_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:  # the directory of a zip is at its end
        raise _damaged(path) from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            "is a TorchScript program, not weights",
            where=str(path),
            hint="Save `model.state_dict()` with torch.save and give that file.",
        )
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(
            "is a zip archive, but no PyTorch checkpoint", where=str(path), hint="Unpack it and give the file inside."
        )
    return "torch"


def _damaged(path: Path) -> CheckpointError:
    return CheckpointError("is cut off or damaged", where=str(path), hint="Download or copy it again.")


def _read_torch(path: Path, *, mmap: bool) -> Any:
    try:
        # Training codes store their arguments beside the weights. A Namespace is a plain record: reading runs no code.
        # So is yacs's CfgNode, a dict of settings; it is read as a dict, and yacs is not needed.
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            # Mapped, so that the optimiser's state in a training checkpoint is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a damaged pickle can raise nearly anything
        blocked = re.search(r"GLOBAL (\S+)", str(error))
        if blocked is None:
            raise _damaged(path) from error
        raise CheckpointError(
            f"holds more than weights: it refers to `{blocked[1]}`, and reading that could run code",
            where=str(path),
            hint="If you trust the file, write a clean copy where it was made: "
            "c = torch.load(FILE, weights_only=False); torch.save({'model': c['model']}, 'clean.pth') "
            "(for a whole model: torch.save(c.state_dict(), 'clean.pth')).",
        ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError as error:
        raise CheckpointError("there is no such file", where=str(path)) from error
    except (SafetensorError, OSError) as error:
        raise _damaged(path) from error


def _choose_copy(path: Path, content: Mapping[Any, Any], weights: str) -> tuple[str | None, Mapping[Any, Any]]:
    """The chosen state dict and its name in the container, None if `content` is one itself."""
    present = [name for names in _COPIES.values() for name in names if isinstance(content.get(name), Mapping)]
    for name in _COPIES[weights]:
        if name in present:
            return name, content[name]
    if present:
        raise CheckpointError(f"has no {weights} weights, only {', '.join(present)}", where=str(path))
    if weights != "model":
        raise CheckpointError(f"holds one set of weights, so there is no {weights}", where=str(path))
    return None, content


def _named_tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    others = [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not found:
        what = f"mixes weights with other things: {listing(others)}" if len(others) < len(found) else "holds no weights"
        entries = listing([str(key) for key in found]) or "none"
        raise CheckpointError(what, where=str(path), hint=f"Expected names of weights at the top; entries: {entries}.")
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        name = key
        while name.startswith(_PREFIXES):
            name = name.split(".", 1)[1]
        if name in state:
            raise CheckpointError(
                f"has the weight {name} twice, with and without a prefix such as `module.`", where=str(path)
            )
        state[name] = value
    return state


def listing(items: list[str]) -> str:
    """The first five of `items` and how many more there are, for a message."""
    more = f", and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(items[:5]) + more


def _hints(path: Path, args: Any, config: Any) -> Hints:
    """From the arguments of a training script, or the yacs configuration that Swin's and VMamba's scripts store."""
    values = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, Mapping) else {}
    name, size, ratio = (values.get(key) for key in ("model", "input_size", "eval_crop_ratio"))
    if isinstance(config, Mapping):
        name, size = name or _setting(config, "MODEL", "NAME"), size or _setting(config, "DATA", "IMG_SIZE")
    return Hints(
        filename=path.name,
        model_name=name if isinstance(name, str) else "",
        image_size=size if isinstance(size, int) and size > 0 else None,
        eval_crop_ratio=ratio if isinstance(ratio, float) and 0 < ratio <= 1 else None,
    )


def _setting(config: Mapping[Any, Any], section: str, key: str) -> Any:
    values = config.get(section)
    return values.get(key) if isinstance(values, Mapping) else None
