"""The checkpoint that a command starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssmprune_cli import checkpoint
from ssmprune_cli.models import Backbone


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how to read it (see `checkpoint.load`)."""

    path: Path
    family: str | None = None
    variant: str | None = None
    weights: str = "model"
    image_size: int | None = None

    def load(self) -> Backbone:
        return checkpoint.load(
            self.path,
            family=self.family,
            variant=self.variant,
            weights=self.weights,
            image_size=self.image_size,
        )
