"""`ssmprune compress`: a request in, an artefact and its report out."""

from __future__ import annotations

from ssmprune_cli.workflows.compress.distillation import distil
from ssmprune_cli.workflows.compress.make import Progress
from ssmprune_cli.workflows.compress.request import CompressRequest
from ssmprune_cli.workflows.compress.run import CompressResult, compress_checkpoint
from ssmprune_cli.workflows.compress.settings import made_smaller, recipe_settings, recipe_size

__all__ = [
    "CompressRequest",
    "CompressResult",
    "Progress",
    "compress_checkpoint",
    "distil",
    "made_smaller",
    "recipe_settings",
    "recipe_size",
]
