"""What tests of several model families share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.tokens import TokenSequence

GOLDEN = Path(__file__).parent.parent / "golden"
Module = TypeVar("Module", bound=nn.Module)


class Recorder(nn.Module):
    """A pruner that drops nothing and keeps every sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.sequences: list[TokenSequence] = []

    def wants(self, block: int) -> Wanted:
        return "y"

    def alignment(self, block: int) -> ScanAlignment | None:
        return None

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        self.sequences.append(sequence)
        return sequence


def spread_weights(model: Module, dtype: torch.dtype) -> Module:
    """`model` to test with: what starts at zero or one would hide mistakes."""
    model = model.to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, parameter.mean().item(), 0.3)
    return model


def published_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a published file."""
    keys = json.loads((GOLDEN / "shapes" / f"{name}.json").read_text(encoding="utf-8"))["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}
