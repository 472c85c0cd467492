"""Published checkpoints: what there is, where its authors put it, and what they say of it."""

from __future__ import annotations

from ssmprune_cli.catalogue.catalogue import Entry, entries, find_entry

__all__ = ["Entry", "entries", "find_entry"]
