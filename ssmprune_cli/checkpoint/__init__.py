"""Read published checkpoints safely, and read and write our own artefact folders."""

from __future__ import annotations

from ssmprune_cli.checkpoint.artefact import check_writable, is_compressed, save, weights_size
from ssmprune_cli.checkpoint.described import described
from ssmprune_cli.checkpoint.files import hub_address, sha256, size
from ssmprune_cli.checkpoint.hub import Address as HubAddress
from ssmprune_cli.checkpoint.hub import explained as hub_errors
from ssmprune_cli.checkpoint.hub import library as hub_library
from ssmprune_cli.checkpoint.hub import parse as parse_address
from ssmprune_cli.checkpoint.loading import build_empty, left_out, load, load_as, non_finite, resolve, variant_name
from ssmprune_cli.checkpoint.own_module import OwnModule, is_own_module, read_own_module, save_own_module
from ssmprune_cli.checkpoint.reading import Checkpoint, read

__all__ = [
    "Checkpoint",
    "HubAddress",
    "OwnModule",
    "build_empty",
    "check_writable",
    "described",
    "hub_address",
    "hub_errors",
    "hub_library",
    "is_compressed",
    "is_own_module",
    "left_out",
    "load",
    "load_as",
    "non_finite",
    "parse_address",
    "read",
    "read_own_module",
    "resolve",
    "save",
    "save_own_module",
    "sha256",
    "size",
    "variant_name",
    "weights_size",
]
