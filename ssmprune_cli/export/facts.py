"""What a file says of the model in it: texts by name, all but plain words as JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from pathlib import Path

from ssmprune_cli import __version__
from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner


def facts(model: Backbone, source: Path | None) -> dict[str, str]:
    """Of `model`, and of the file or artefact `source` that it was read from, if one is known.

    `preprocessing` is left out where none is known.
    """
    found = {
        "ssmprune": __version__,
        "family": model.family,
        "task": model.task,
        "configuration": json.dumps(asdict(model.config)),
        "class_names": json.dumps(model.class_names),
    }
    with contextlib.suppress(UsageError):
        found["preprocessing"] = json.dumps(asdict(model.preprocessing))
    if isinstance(model.pruner, TokenPruner):
        settings = model.pruner.settings.to_dict()
        found["schedule"] = json.dumps(settings.pop("schedule"))
        found["method"] = json.dumps(settings)
    if source is not None:
        found |= {"source": source.name, "source_sha256": _sha256(source)}
    return found


def _sha256(path: Path) -> str:
    """Of a file, or of the names and contents of the files in a folder."""
    digest = hashlib.sha256()
    if path.is_dir():
        for file in sorted(each for each in path.iterdir() if each.is_file()):
            digest.update(f"{file.name} {_sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
