"""compress, profile and eval of a user's own module, which code of the user's builds: `--module PACKAGE:FUNCTION`."""

from __future__ import annotations

from ssmprune_cli.workflows.own_module.compress import ModuleCompression, compress_module
from ssmprune_cli.workflows.own_module.evaluate import evaluate_module
from ssmprune_cli.workflows.own_module.profile import ModuleProfile, profile_module
from ssmprune_cli.workflows.own_module.source import ModuleSource

__all__ = [
    "ModuleCompression",
    "ModuleProfile",
    "ModuleSource",
    "compress_module",
    "evaluate_module",
    "profile_module",
]
