"""`torch.export`: PyTorch's own operators only, so that the file is read with torch alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ssmprune_cli.export.graph import parts, too_old
from ssmprune_cli.export.target import ExportTarget, Run, Wanted
from ssmprune_cli.kernels import PLAIN

FACTS = "ssmprune.json"  # in the file's `extra_files`


def _write(graph: ExportedProgram, path: Path, wanted: Wanted) -> None:
    table = torch.export.default_decompositions()
    table.update(PLAIN)
    torch.export.save(graph.run_decompositions(table), path, extra_files={FACTS: json.dumps(dict(wanted.facts))})


def _open(path: Path) -> Mapping[str, Run]:
    computed = torch.export.load(path).module()
    return {"torch": lambda images: parts(computed(images))}


PT2 = ExportTarget(".pt2", too_old, _write, _open)
