"""From a file or folder to named tensors: containers, prefixes, refusals that say what to do. Runs no pickled code."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssmprune_cli.checkpoint import stated
from ssmprune_cli.checkpoint.artefact import FORMAT, Artefact, read_config
from ssmprune_cli.checkpoint.files import CONFIG, DENSE, INDEXES, WEIGHTS, locate, parts, read_json, shards
from ssmprune_cli.checkpoint.pickled import OtherTensor
from ssmprune_cli.checkpoint.replacing import recover
from ssmprune_cli.checkpoint.stored import damaged, protocol_of, read_legacy, read_safetensors, read_zip
from ssmprune_cli.errors import CheckpointError, UsageError, listing, shown
from ssmprune_cli.files import open_regular
from ssmprune_cli.models import Hints

# Where training codes put the weights and their moving average.
_COPIES = {
    "model": ("model", "state_dict", "model_state_dict", "module", "net", "network", "params"),
    "model_ema": ("model_ema", "state_dict_ema", "ema_state_dict", "module_ema", "params_ema", "ema"),
}
# Wrappers put these before every name: DistributedDataParallel, torch.compile, Lightning modules and such.
_WRAPPERS = ("module.", "_orig_mod.")
_PREFIXES = ("model.", "net.", "network.", "backbone.")
_COUNTERS = ("total_ops", "total_params")  # what thop leaves in a model that it has counted
_MAX_DEPTH = 3  # containers in containers


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds, as it was stored.

    kind      "torch", "torch (legacy)", "safetensors", "sharded", "transformers folder" or "ssmprune folder"
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
    """Read a checkpoint file, a sharded one by its index, a folder of transformers, or one of our folders.

    weights  which copy to take from a container that has several: "model", "model_ema" or the name of an entry

    Raises CheckpointError for whatever is not a checkpoint or not safe to read, UsageError for unknown `weights`.
    """
    path = locate(path)
    recover(path)
    statements: dict[str, Any] = {}
    if path.is_dir():
        folder = _transformers(path)
        if folder is None:
            artefact = read_config(path)
            content, _ = read_safetensors(path / WEIGHTS)
            return Checkpoint(path, "ssmprune folder", (), None, content, Hints(filename=path.name), artefact)
        statements["config"] = read_json(path / CONFIG) if (path / CONFIG).exists() else None
        kind, content = "transformers folder", _read_file(folder)[1]
    else:
        statements["config"] = _beside(path)
        kind, content = _read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, not weights by name", where=str(path))
    used, found = _choose_copy(path, content, weights)
    try:
        hints = stated.hints(path.name, {**content, **{name: each for name, each in statements.items() if each}})
    except CheckpointError as error:
        raise CheckpointError(error.what, where=str(path), hint=error.hint) from error
    state = _named_tensors(path, found)
    entries = () if used is None else tuple(map(str, content))
    return Checkpoint(path=path, kind=kind, entries=entries, used=used, state=state, hints=hints)


def read_dense(checkpoint: Checkpoint, *, needed: bool) -> dict[str, Tensor]:
    """The weights of the dense model that are others than those of the artefact `checkpoint`, by name.

    CheckpointError if they are `needed`, as of a model that was resized or cut short, and are not there.
    """
    if checkpoint.artefact is None:
        return {}
    file = checkpoint.path / DENSE
    if not os.path.lexists(file):
        if not needed:
            return {}
        raise CheckpointError(
            f"was resized or cut short, and what it was before is not in it: there is no {DENSE}",
            where=str(checkpoint.path),
            hint="One that was fine-tuned has no dense model any more. Give the checkpoint that it was made of.",
        )
    return read_safetensors(file)[0]


def _transformers(folder: Path) -> Path | None:
    """The file of the weights in a folder as transformers saves it; None for one of ours, or neither."""
    names = [WEIGHTS, *INDEXES, "pytorch_model.bin"]
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        return None
    if (folder / CONFIG).exists():
        values = read_json(folder / CONFIG)
        if not isinstance(values, dict) or values.get("format") == FORMAT:
            return None
        return present[0] if "model_type" in values or _of_language(values) else None
    return None


def _of_language(values: Any) -> bool:
    """Whether a config.json is that of a language model, as state-spaces or transformers write it."""
    return isinstance(values, dict) and ("ssm_cfg" in values or values.get("model_type") in ("mamba", "mamba2"))


def _beside(file: Path) -> Any:
    """The config.json beside the weights of a language model; None for other files."""
    path = file.with_name(CONFIG)
    if file.name not in (WEIGHTS, *INDEXES, "pytorch_model.bin") or not path.is_file():
        return None
    values = read_json(path)
    return values if _of_language(values) else None


def _read_file(path: Path) -> tuple[str, Any]:
    """The kind of a file and what it holds. Metadata of safetensors is an entry of its own beside the weights."""
    kind = _sniff(path)
    if kind == "torch":
        return kind, read_zip(path)
    if kind == "torch (legacy)":
        return kind, read_legacy(path)
    if kind == "sharded":
        return kind, _read_shards(path)
    tensors, metadata = read_safetensors(path)
    return kind, {"state_dict": tensors, "metadata": metadata} if set(metadata) - {"format"} else tensors


def _read_shards(index: Path) -> dict[str, Any]:
    names, files = shards(index)
    found: dict[str, Any] = {}
    for file in files:
        if _sniff(file) == "sharded":
            raise CheckpointError("is an index and named as a part of one", where=str(file))
        content = _read_file(file)[1]
        inner = content.get("state_dict", content) if isinstance(content, Mapping) else {}
        for name, value in inner.items():
            if names.get(name) != file.name:
                raise CheckpointError(f"holds {shown(str(name))}, which the index does not say of it", where=str(file))
            found[name] = value
    missing = [name for name in names if name not in found]
    if missing:
        raise CheckpointError(f"lacks weights that its index names: {listing(missing)}", where=str(index))
    return found


def _sniff(path: Path) -> str:
    """The kind of a file from its first bytes. Raises CheckpointError for what is no checkpoint."""
    with open_regular(path, CheckpointError) as file:
        try:
            head = file.read(512)
            size = file.seek(0, 2)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=str(path)) from error
    header = int.from_bytes(head[:8], "little")
    if head.startswith(b"PK\x03\x04"):
        return "torch"
    if len(head) > 8 and head[8:9] == b"{" and header < 1 << 30:
        if 8 + header > size:
            raise damaged(path)
        return "safetensors"
    if path.name.endswith(".index.json"):
        return "sharded"
    if protocol_of(head) is not None:
        return "torch (legacy)"
    what, hint = _what(head)
    raise CheckpointError(what, where=str(path), hint=hint)


_FORMATS = (
    (b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes", "Its weights are not those of a PyTorch model."),
    (b"\x93NUMPY", "is one array of numpy", "Expected the weights of a model by name."),
    (b"GGUF", "is a GGUF file of a language model", "Expected a PyTorch checkpoint or a .safetensors file."),
    (b"\x1f\x8b", "is a packed archive", "Unpack it and give the checkpoint inside."),
    (b"BZh", "is a packed archive", "Unpack it and give the checkpoint inside."),
    (b"\xfd7zXZ\x00", "is a packed archive", "Unpack it and give the checkpoint inside."),
    (b"\x28\xb5\x2f\xfd", "is a packed archive", "Unpack it and give the checkpoint inside."),
    (b"7z\xbc\xaf\x27\x1c", "is a packed archive", "Unpack it and give the checkpoint inside."),
    (
        b"version https://git-lfs",
        "is a Git LFS pointer, not the weights themselves",
        "Run `git lfs pull` where it was cloned.",
    ),
)


def _what(head: bytes) -> tuple[str, str]:
    """What a file is that is no checkpoint, and what to do."""
    expected = "Expected a PyTorch checkpoint (.pth, .pt, .bin), a .safetensors file or an output folder of ssmprune."
    if not head:
        return "the file is empty", expected
    for start, what, hint in _FORMATS:
        if head.startswith(start):
            return what, hint
    if head[257:262] == b"ustar":
        return "is a packed archive", "Unpack it and give the checkpoint inside."
    if re.match(rb"\s*<(!doctype|html|\?xml)", head, re.IGNORECASE):
        return "is a web page, not a checkpoint", "Download it again with the link of the file itself."
    if re.fullmatch(rb"[\t\n\r\x20-\x7e]+", head):
        return "is a text file, not a checkpoint", expected
    if head[:1] == b"\x80":
        return (
            f"is a pickle of protocol {head[1] if len(head) > 1 else 'unknown'}, which no Python writes yet",
            expected,
        )
    return "is not a checkpoint of a known format", expected


def _choose_copy(path: Path, content: Mapping[Any, Any], weights: str) -> tuple[str | None, Mapping[Any, Any]]:
    """The chosen state dict and its name in the container, None if `content` is one itself."""
    used: str | None = None
    for _ in range(_MAX_DEPTH):
        known = [name for names in _COPIES.values() for name in names if _holds_weights(content.get(name))]
        if weights not in _COPIES:
            if not _holds_weights(content.get(weights)):
                raise UsageError(
                    f"unknown weights {weights!r}",
                    where="--weights",
                    hint=f"Known: {', '.join(dict.fromkeys([*_COPIES, *known]))}.",
                )
            names = [weights]
        else:
            names = [name for name in _COPIES[weights] if name in known]
        if len(names) > 1:
            choice = " or ".join(f"`--weights {name}`" for name in names)
            raise CheckpointError(
                f"has several sets of weights: {', '.join(names)}", where=str(path), hint=f"Type {choice}."
            )
        if not names:
            if known:
                raise CheckpointError(f"has no {weights} weights, only {', '.join(known)}", where=str(path))
            if weights != "model" and used is None:
                raise CheckpointError(f"holds one set of weights, so there is no {weights}", where=str(path))
            return used, content
        used, content, weights = names[0], content[names[0]], "model"
    return used, content


def _holds_weights(value: Any) -> bool:
    """Whether `value` is a dict with a tensor in it, or with a dict that is."""
    inner = value.values() if isinstance(value, Mapping) else ()
    return any(isinstance(each, Tensor | OtherTensor | Mapping) for each in inner)


def _named_tensors(path: Path, found: Mapping[Any, Any]) -> dict[str, Tensor]:
    odd = [(key, value) for key, value in found.items() if isinstance(value, OtherTensor)]
    if odd:
        key, value = odd[0]
        raise CheckpointError(
            f"has the weight {shown(str(key))} as a {value.kind}",
            where=str(path),
            hint="Save the weights as ordinary tensors: dense, in float32 or float16, each with its own values.",
        )
    others = [str(key) for key, value in found.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not found:
        what = f"mixes weights with other things: {listing(others)}" if len(others) < len(found) else "holds no weights"
        entries = listing([str(key) for key in found]) or "none"
        raise CheckpointError(what, where=str(path), hint=f"Expected names of weights at the top; entries: {entries}.")
    state: dict[str, Tensor] = {}
    for key, value in found.items():
        name = key
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name.rpartition(".")[2] in _COUNTERS:
            continue
        if name in state:
            raise CheckpointError(
                f"has the weight {shown(name)} twice, with and without a prefix such as `module.`", where=str(path)
            )
        state[name] = value
    if not state:
        raise CheckpointError("holds no weights, only what thop counted", where=str(path))
    while prefix := next((each for each in (*_PREFIXES, *_WRAPPERS) if all(key.startswith(each) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    if sum(value.numel() * value.element_size() for value in state.values()) > 2 * _bytes(path):
        raise CheckpointError(
            "has weights that share their values: together they are larger than the file",
            where=str(path),
            hint="Save each with its own values: {name: value.clone() for name, value in weights.items()}.",
        )
    return state


def _bytes(path: Path) -> int:
    """Length of the files of a checkpoint."""
    return sum(part.stat().st_size for part in parts(path) if part.exists())
