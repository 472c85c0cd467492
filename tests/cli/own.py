"""Functions that `--module` is given in tests: a classifier of images as a user has it, and what is refused."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.adapt.modules import Block, classifier


class Pictures(nn.Module):
    """Images (B, 3, H, W) to logits (B, 3), of patches of 4 pixels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, L, d)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean(dim=1))
        return logits


class Wrapped(nn.Module):
    """All keys begin with `model.`, which checkpoints are read without."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Pictures()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits


def pictures() -> nn.Module:
    print("building")  # noqa: T201, as users do
    return Pictures()


def wider() -> nn.Module:
    return Pictures(24)


def of_tokens() -> nn.Module:
    """It takes no images."""
    return classifier()


def flat() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))


def meta() -> nn.Module:
    with torch.device("meta"):
        return Pictures()


def number() -> int:
    return 3


def broken() -> nn.Module:
    raise KeyError("config.yaml")


constant = 3
