"""Whether weights come from a model that is compressed as the one that they are loaded into."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from ssmprune_cli.errors import UsageError, listing

SETTINGS = "settings"  # what a pruner adds to the metadata of a state dict: its settings as JSON
_ALIKE = (
    "Compress this model in the same way first, or keep models in folders: `ssmprune_cli.save`, `ssmprune_cli.load`."
)


def check_compression(model: nn.Module, state: Mapping[str, Any]) -> None:
    """UsageError unless the pruner in `state` is one like that of `model`: by the names of its buffers, and by its
    settings where the state dict still has the metadata that torch gives it."""
    own = model.state_dict()
    ours, theirs = _buffers(own), _buffers(state)
    ours_set, theirs_set = _settings(own), _settings(state)
    knows = hasattr(state, "_metadata")
    if (theirs or theirs_set) and not (ours or ours_set):
        said = f" ({listing(theirs, 2)})" if theirs else ""
        raise UsageError(
            f"these are the weights of a compressed model, with its pruner{said}, and this model is dense",
            where="load_state_dict",
            hint=f"{_ALIKE} For a dense model leave out the names that begin with `pruner.`: the others are those of "
            "the dense one.",
        )
    if (ours or (ours_set and knows)) and not (theirs or theirs_set):
        raise UsageError(
            "these are the weights of a dense model, and this one is compressed",
            where="load_state_dict",
            hint="Call `ssmprune_cli.restore(model)`, load them, and compress again: what was calibrated is for the "
            "weights from before.",
        )
    faults = [f"{name} is missing" for name in ours if name not in theirs]
    faults += [f"{name} is left over" for name in theirs if name not in ours]
    faults += [
        f"{name} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in theirs
        if name in ours and state[name].shape != own[name].shape
    ]
    if ours_set and theirs_set:
        here, there = json.loads(ours_set), json.loads(theirs_set)
        faults += [f"{key} is {there.get(key)}, and here {here[key]}" for key in here if here[key] != there.get(key)]
    if faults:
        raise UsageError(
            f"these are the weights of a model that is compressed otherwise: {listing(faults)}",
            where="load_state_dict",
            hint=_ALIKE,
        )


def _buffers(state: Mapping[str, Any]) -> list[str]:
    """Names of a pruner's buffers."""
    return [name for name in state if name.startswith(("pruner.", "encoder.pruner."))]


def _settings(state: Mapping[str, Any]) -> str | None:
    metadata = getattr(state, "_metadata", {})
    for place in ("pruner", "encoder.pruner"):
        if SETTINGS in metadata.get(place, {}):
            return str(metadata[place][SETTINGS])
    return None
