"""Published language models: state-spaces' files (`pytorch_model.bin` beside a config.json) and transformers' (-hf)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import CheckpointError, UsageError, listing
from ssmprune_cli.models.common import Hints, Shapes, count_numbered
from ssmprune_cli.models.language.config import LENGTH, PROTECT_LAST

_BEFORE = "backbone."
_EMBEDDINGS = ("embedding.weight", "embeddings.weight")  # of state-spaces, of transformers
_HEAD = "lm_head.weight"
# What no weight's shape tells, and only one way is computed here.
COMPUTES: Mapping[str, frozenset[Any]] = {
    "hidden_act": frozenset({"silu", "swish"}),
    "rms_norm": frozenset({True}),
    "layer_norm_epsilon": frozenset({1e-5}),
    "use_bias": frozenset({False}),
    "d_intermediate": frozenset({0}),
}


def is_language_model(shapes: Shapes) -> bool:
    """Whether these are the keys of an embedding and a sequence of Mamba blocks."""
    names = {name.removeprefix(_BEFORE) for name in shapes}
    return any(name in names for name in _EMBEDDINGS) and "layers.0.mixer.A_log" in names


def has(shapes: Shapes, name: str) -> bool:
    """Whether the first mixer has the parameter `name`."""
    return any(prefix + f"layers.0.mixer.{name}" in shapes for prefix in ("", _BEFORE))


def remap(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names. A head with the values of the embedding is the embedding."""
    found = {name.removeprefix(_BEFORE): value for name, value in state.items()}
    if "embeddings.weight" in found:
        found["embedding.weight"] = found.pop("embeddings.weight")
    embedding, head = found.get("embedding.weight"), found.get(_HEAD)
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del found[_HEAD]
    return found


def read_sizes(shapes: Shapes, hints: Hints, title: str) -> dict[str, Any]:
    """The fields of LanguageConfig but `d_state`. Raises CheckpointError."""
    vocab_size, embed_dim = shape_of(shapes, "embedding.weight", 2, title)
    tied = _HEAD not in shapes
    for name in ("tie_embeddings", "tie_word_embeddings"):
        for stated in hints.settings.get(name, ()):
            if stated is True and not tied:
                raise CheckpointError(f"says {name}, and its head has other values than its embedding")
    padded = vocab_size - stated_number(hints, ("vocab_size",), vocab_size)
    if not 0 <= padded < 1024:
        raise CheckpointError(
            f"the embedding has {vocab_size} rows, and the file says vocab_size {vocab_size - padded}"
        )
    d_conv = shape_of(shapes, "layers.0.mixer.conv1d.weight", 3, title)[2]
    d_inner = shape_of(shapes, "layers.0.mixer.out_proj.weight", 2, title)[1]
    return {
        "vocab_size": vocab_size,
        "embed_dim": embed_dim,
        "depth": count_numbered(shapes, r"layers\.(\d+)\."),
        "d_conv": d_conv,
        "d_inner": None if d_inner == 2 * embed_dim else d_inner,
        "tied": tied,
        "length": hints.length or LENGTH,
        "protect_last": hints.protect_last or max(PROTECT_LAST, d_conv),
    }


def shape_of(shapes: Shapes, key: str, dimensions: int, title: str) -> tuple[int, ...]:
    """The shape of the weight `key`. CheckpointError if it is not there or has not `dimensions`."""
    found = shapes.get(key)
    if found is None or len(found) != dimensions:
        problem = "is missing" if found is None else f"has the shape {found}"
        raise CheckpointError(f"not a {title}: the weight {key} {problem}")
    return found


def stated_number(hints: Hints, names: tuple[str, ...], default: int) -> int:
    """What the file says under one of `names`. CheckpointError if that is no number from 1 on, or more than one."""
    values = [value for name in names for value in hints.settings.get(name, ())]
    if not values:
        return default
    if len(set(values)) > 1 or type(values[0]) is not int or values[0] < 1:
        raise CheckpointError(f"the file says {names[0]} {listing(values)}, which is no one number from 1 on")
    return values[0]


def resize(state: dict[str, Tensor], config: Any, side: int) -> tuple[dict[str, Tensor], Any]:
    """UsageError: a text has no pixels."""
    raise UsageError("a language model takes text, which has no image size", hint="Give `--length` for other windows.")


def fills(config: Any, side: int) -> bool:
    """No images fit."""
    return False
