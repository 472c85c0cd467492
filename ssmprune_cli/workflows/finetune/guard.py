"""What to say of a loss that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssmprune_cli.tokens import TokenSequence

PATIENCE = 3  # updates in a row that are skipped before the training stops


def first_non_finite(model: nn.Module, forward: nn.Module, images: Tensor) -> str:
    """Where numbers stop being finite in `forward(images)`, in words: a weight, or the first layer whose output is not.

    `forward` is `model` or what wraps it (autocast, processes).
    """
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"the weight {name}"
    if not images.isfinite().all():
        return "the images"
    found: list[str] = []
    handles: list[RemovableHandle] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in _tensors(output)):
                found.append(f"{name or 'the model'} ({type(module).__name__})")

        return hook

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(watch(name)))
    try:
        with torch.no_grad():
            forward(images)
    finally:
        for handle in handles:
            handle.remove()
    return f"the output of {found[0]}" if found else "no activation: the loss itself, or the gradient"


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, TokenSequence):
        yield value.hidden
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
