"""The checkpoint that a command starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssmprune_cli import checkpoint
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@dataclass(frozen=True)
class Source:
    """A checkpoint, and how to read it."""

    path: Path
    reading: Reading = NOTHING_SAID

    def load(self) -> Backbone:
        """The dense model, also of an artefact that is compressed already."""
        return checkpoint.load_as(self.path, self.reading, dense=True)

    def warnings(self) -> list[str]:
        """What is to be known of the checkpoint before it is compressed."""
        if not checkpoint.is_compressed(self.path):
            return []
        return ["The input is compressed already: its dense weights are compressed anew, and compared with."]
