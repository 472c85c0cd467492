"""Prefill with tokens dropped between blocks, and what follows token by token. Letters: as in backbone.py.

The last tokens of a prompt are protected, so the convolutions' inputs and the scans' states that a step starts from are
those of tokens that are there. Generated tokens are never dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.models.language.backbone import LanguageModel
from ssmprune_cli.models.language.recurrence import MixerState
from ssmprune_cli.models.mamba import MambaBlock


@dataclass(frozen=True)
class Prefilled:
    """A prompt as the next token sees it: the logits (B, V) after it, and the state of every block's mixer.

    kept  tokens of the prompt that entered each block
    """

    logits: Tensor
    states: tuple[MixerState, ...]
    kept: tuple[int, ...]


@torch.inference_mode()
def prefill(model: LanguageModel, ids: Tensor) -> Prefilled:
    """Read a prompt `ids` (B, L); the model's pruner, if it has one, drops tokens. Op by op."""
    _check(model, ids)
    sequence = model.embed(ids)
    states: list[MixerState] = []
    kept: list[int] = []
    for block, layer in enumerate(model.layers):
        assert isinstance(layer, MambaBlock)
        kept.append(sequence.positions.shape[1])
        alignment, wanted = model.ask_pruner(block, sequence)
        stream, live, frozen, context = layer.normalised(sequence)
        recurrence = model.recurrence(layer.mixer)
        hidden, statistics, state = recurrence.prefill(live, sequence, alignment, wanted, frozen, context)
        states.append(state)
        sequence = replace(sequence, hidden=hidden, residual=stream)
        sequence = model.prune(block, sequence, statistics, wanted)
    logits = model.scores(model.pool(sequence)[:, -1:])[:, 0]
    return Prefilled(logits, tuple(states), tuple(kept))


@torch.inference_mode()
def step(model: LanguageModel, ids: Tensor, before: Prefilled) -> Prefilled:
    """Read one more token, `ids` (B,). DataError for another shape or dtype."""
    if ids.shape != before.logits.shape[:1] or ids.dtype != torch.int64:
        raise DataError(
            f"a step reads one token of each of {len(before.logits)} texts, (B,) in int64, not {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    hidden, stream = model.embedding(ids)[:, None], None  # (B, 1, d)
    states: list[MixerState] = []
    for layer, state in zip(model.layers, before.states, strict=True):
        assert isinstance(layer, MambaBlock)
        stream = hidden if stream is None else stream + hidden
        stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
        hidden, after = model.recurrence(layer.mixer).step(layer.norm(stream), state)
        states.append(after)
    assert stream is not None
    logits = model.scores(model.normalised(stream + hidden))[:, 0]
    return Prefilled(logits, tuple(states), before.kept)


def generate(model: LanguageModel, ids: Tensor, max_new_tokens: int) -> Tensor:
    """`ids` (B, L) with `max_new_tokens` more, each the likeliest next one: (B, L + max_new_tokens).

    Raises UsageError for a number below 0, DataError for a token that is not in the vocabulary.
    """
    if max_new_tokens < 0:
        raise UsageError(f"max_new_tokens is at least 0, not {max_new_tokens}")
    _check(model, ids)
    found = [ids]
    state: Prefilled | None = None
    for _ in range(max_new_tokens):
        state = prefill(model, ids) if state is None else step(model, found[-1][:, 0], state)
        found.append(state.logits.argmax(dim=1, keepdim=True))
    return torch.cat(found, dim=1)


def _check(model: LanguageModel, ids: Tensor) -> None:
    if not isinstance(model, LanguageModel):
        raise UsageError(f"a {type(model).__name__} generates no text: it is no language model of ours")
    if ids.numel():
        model.check_ids(ids)
