"""What a file says of the model in it: texts by name, all but plain words as JSON."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

from ssmprune_cli import __version__
from ssmprune_cli.checkpoint import hub_address, sha256
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone, Detector
from ssmprune_cli.pruning import TokenPruner


def facts(model: Backbone, target: str, source: Path | None) -> dict[str, str]:
    """Of `model` in a file of this `target`, and of the file or artefact `source` that it was read from, if one is
    known."""
    found = {"ssmprune": __version__, "format": target, **said_of(model)}
    if source is not None:
        found |= {"source": hub_address(source) or source.name, "source_sha256": sha256(source)}
    return found


def said_of(model: Backbone) -> dict[str, str]:
    """What a model is, its weights apart. `preprocessing` is left out where none is known; of a detector the outputs
    are named, with their strides in pixels."""
    found = {
        "family": model.family,
        "task": model.task,
        "configuration": json.dumps(asdict(model.config)),
        "class_names": json.dumps(model.class_names),
    }
    with contextlib.suppress(UsageError):
        found["preprocessing"] = json.dumps(asdict(model.preprocessing))
    if model.eight_bit_kinds:
        found["eight_bits"] = json.dumps(model.eight_bit_kinds)
    if isinstance(model, Detector):
        found["holds"] = "backbone and feature pyramid"
        found["strides"] = json.dumps(model.strides)
    if isinstance(model.pruner, TokenPruner):
        settings = model.pruner.settings.to_dict()
        found["schedule"] = json.dumps(settings.pop("schedule"))
        found["method"] = json.dumps(settings)
    return found
