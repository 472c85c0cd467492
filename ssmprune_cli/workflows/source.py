"""The checkpoint that a command starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import CheckpointError, shown
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@dataclass(frozen=True)
class Source:
    """A checkpoint, how to read it, and what it is called beside others: by default its file's name."""

    path: Path
    reading: Reading = NOTHING_SAID
    called: str = ""

    @property
    def name(self) -> str:
        return self.called or self.path.name

    def load(self) -> Backbone:
        """The dense model, also of an artefact that is compressed already."""
        return checkpoint.load_as(self.path, self.reading, dense=True)

    @property
    def origin(self) -> dict[str, str]:
        """Name and SHA-256 of the file, and where on the hub it was taken from, if it was."""
        address = checkpoint.hub_address(self.path)
        known = {} if address is None else {"input_address": address}
        return {"input": shown(self.path.name), "input_sha256": checkpoint.sha256(self.path), **known}

    def check_pinned(self, provenance: Mapping[str, Any]) -> None:
        """CheckpointError if a recipe was made from the same file of the hub (its `provenance` says so), and the file
        is another one now."""
        pinned, own = provenance.get("input_address"), checkpoint.hub_address(self.path)
        if not isinstance(pinned, str) or own is None:
            return
        before, now = (checkpoint.parse_address(each) for each in (pinned, own))
        if (before.repository, before.file) != (now.repository, now.file):
            return
        if provenance.get("input_sha256") != checkpoint.sha256(self.path):
            raise CheckpointError(
                "is another file now than the one that the recipe was made from: their SHA-256 differ",
                where=own,
                hint=f"Give {pinned} for that one, or remove `provenance` from the recipe to go by the new one.",
            )

    def warnings(self) -> list[str]:
        """What is to be known of the checkpoint before it is compressed."""
        if not checkpoint.is_compressed(self.path):
            return []
        return ["The input is compressed already: its dense weights are compressed anew, and compared with."]
