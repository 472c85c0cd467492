"""Read published checkpoints safely, and read and write our own artefact folders."""

from __future__ import annotations

from ssmprune_cli.checkpoint.artefact import check_writable, is_compressed, save
from ssmprune_cli.checkpoint.files import sha256
from ssmprune_cli.checkpoint.loading import build_empty, load, load_as, non_finite, resolve, variant_name
from ssmprune_cli.checkpoint.reading import Checkpoint, read

__all__ = [
    "Checkpoint",
    "build_empty",
    "check_writable",
    "is_compressed",
    "load",
    "load_as",
    "non_finite",
    "read",
    "resolve",
    "save",
    "sha256",
    "variant_name",
]
