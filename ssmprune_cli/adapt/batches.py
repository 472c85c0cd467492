"""What a user has for calibration inputs, as batches that a module of anybody's takes; and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ssmprune_cli.errors import UsageError
from ssmprune_cli.pruning import divergence, relative_error

R = TypeVar("R")

_AT_ONCE = 16  # samples of one tensor that go through the model together
_WANTED = (
    "Give a tensor of inputs, or batches of them: tensors, (inputs, labels) as a DataLoader has, or dictionaries of "
    "the model's arguments."
)


class Batch:
    """One call of a model: `inputs` are its argument, or its arguments by name. Its length counts samples."""

    def __init__(self, inputs: Tensor | dict[str, Any]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        if isinstance(self.inputs, Tensor):
            return len(self.inputs)
        return max((len(each) for each in self.inputs.values() if isinstance(each, Tensor) and each.ndim), default=1)

    def sizes(self) -> list[tuple[int, ...]]:
        """Of each tensor, without the samples."""
        return [tuple(each.shape[1:]) for each in self._tensors()]

    @property
    def has_nan(self) -> bool:
        return any(bool(each.isnan().any()) for each in self._tensors())

    def _tensors(self) -> Iterator[Tensor]:
        return _tensors([self.inputs] if isinstance(self.inputs, Tensor) else self.inputs.values())

    def given_to(self, call: Callable[..., R]) -> R:
        return call(**self.inputs) if isinstance(self.inputs, dict) else call(self.inputs)

    def first(self) -> Batch:
        """Its first sample, copied: an inference tensor has no part in a gradient."""
        if isinstance(self.inputs, Tensor):
            return Batch(self.inputs[:1].clone())
        count = len(self)
        return Batch(
            {
                name: each[:1].clone() if isinstance(each, Tensor) and each.ndim and len(each) == count else each
                for name, each in self.inputs.items()
            }
        )


def as_calls(model: nn.Module, calibration: Any) -> list[Batch]:
    """Batches on the model's device, floats in its dtype. UsageError for what is none, and where there are none."""
    like = next(model.parameters())

    def placed(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.as_tensor(value)
        if not isinstance(value, Tensor):
            return value
        return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)

    def batch(value: Any) -> Batch:
        if isinstance(value, tuple | list) and value:
            value = value[0]  # the rest are labels
        if isinstance(value, Mapping):
            return Batch({str(name): placed(each) for name, each in value.items()})
        if not isinstance(value, Tensor | np.ndarray):
            raise UsageError(f"calibration inputs are of type {type(value).__name__}", hint=_WANTED)
        return Batch(placed(value))

    if calibration is None:
        raise UsageError(
            "a module that is none of our backbones is compressed by what it does with inputs, and there are none",
            hint=f"Give `calibration=`. {_WANTED}",
        )
    parts: Iterable[Any]
    if isinstance(calibration, Tensor | np.ndarray):
        parts = torch.as_tensor(calibration).split(_AT_ONCE)
    elif isinstance(calibration, Mapping):
        parts = [calibration]
    elif isinstance(calibration, Iterable) and not isinstance(calibration, str | bytes):
        parts = calibration
    else:
        raise UsageError(f"a value of type {type(calibration).__name__} holds no calibration inputs", hint=_WANTED)
    found = [batch(each) for each in parts]
    if not sum(map(len, found)):
        raise UsageError("there are no calibration inputs", hint=_WANTED)
    first = found[0].sizes()
    for each in found:
        if each.has_nan:
            raise UsageError("calibration inputs hold a NaN", hint="Leave those samples out.")
        if each.sizes() != first:
            raise UsageError(
                f"calibration inputs have two sizes: {first} and {each.sizes()}",
                hint="Give inputs of one size. The compressed model takes others too, and keeps the same share.",
            )
    return found


Run = Callable[[Batch], Any]


def caller(model: nn.Module) -> Run:
    """Calls `model` with a batch."""
    return lambda batch: batch.given_to(model)


def answer_of(output: Any) -> Tensor:
    """The tensor in a model's `output`: itself, its `logits` or `last_hidden_state`, or the first of several.

    Raises UsageError where there is none.
    """
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if value is None and isinstance(output, Mapping):
            value = output.get(name)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list):
        output = next(_tensors(output), output)
    if not isinstance(output, Tensor):
        raise UsageError(
            f"the model answers with a {type(output).__name__}, in which there is no tensor, `logits` or "
            "`last_hidden_state` to compare",
            hint="Wrap it in a module whose `forward` returns one.",
        )
    return output


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    return (each for each in values if isinstance(each, Tensor))


def distance(dense: Tensor, pruned: Tensor, protected: tuple[int, ...], length: int) -> Tensor:
    """(B,) float64: how far the answer `pruned` is from `dense`.

    Of logits (B, C) or (B, C, H, W) the divergence of the class probabilities in nats. Of logits for each token
    (B, L, C) that of the last of the `protected` tokens. Of anything else the relative squared error.
    """
    if dense.shape != pruned.shape:
        raise UsageError(
            f"the answer has shape {tuple(dense.shape)} when dense and {tuple(pruned.shape)} with tokens dropped",
            hint="Let the head of the Adapter answer in one shape: from a mean, or from protected tokens.",
        )
    if dense.ndim == 3 and dense.shape[1] == length and protected:
        dense, pruned = (each[:, protected[-1]] for each in (dense, pruned))
    if dense.is_floating_point() and dense.ndim in (2, 4):
        return divergence(dense, pruned)
    return relative_error(dense, pruned)
