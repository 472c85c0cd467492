"""What is measured: a model of a checkpoint or an artefact, or a file that `ssmprune export` wrote."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from ssmprune_cli import checkpoint
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.export import OnnxSession, make_ready, opened
from ssmprune_cli.inference import Session, prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.workflows.measure import in_precision, resolve_device


@dataclass(frozen=True)
class Subject:
    """A model, or an exported file.

    file_bytes        of the file, or of all that a checkpoint or an artefact is made of
    read_in_seconds   once: from the path to a model, or to a file's session
    """

    path: Path
    model: Backbone | OnnxSession
    file_bytes: int
    read_in_seconds: float


def read(paths: list[Path], reading: Reading, precision: str, device: str) -> list[Subject]:
    """What is at each of `paths`. Raises UsageError for what is asked of an exported file and cannot be: another
    precision, another device, another way to prepare images."""
    exported = {path: file for path in paths if (file := exported_file(path)) is not None}
    if exported:
        _refuse(exported, everything=len(exported) == len(paths), reading=reading, precision=precision, device=device)
    return [_read(path, exported.get(path), reading, precision) for path in paths]


def exported_file(path: Path) -> Path | None:
    """The file of `ssmprune export` that is meant by `path`, itself or its folder; None for anything else."""
    if path.suffix == ".onnx":
        return path
    if path.suffix == ".pt2" or (path / "model.pt2").is_file():
        raise SsmpruneError(
            "is not measured: torch.export unpickles such a file, which may run whatever code is in it",
            where=str(path),
            hint="Type `ssmprune export CHECKPOINT --out FILE.onnx`, and measure that.",
        )
    inside = path / "model.onnx"
    return inside if inside.is_file() and not (path / "config.json").exists() else None


def _refuse(exported: dict[Path, Path], *, everything: bool, reading: Reading, precision: str, device: str) -> None:
    where = str(next(iter(exported)))
    if precision != "fp32":
        raise UsageError(
            f"an exported file computes in what it was exported in, and not in {precision}",
            where=where,
            hint="Leave out `--precision`.",
        )
    if resolve_device(device).type != "cpu":
        raise UsageError("an exported file is measured on the CPU", where=where, hint="Leave out `--device`.")
    if everything and reading != NOTHING_SAID:
        raise UsageError(
            "an exported file says itself what it is and how images are prepared",
            where=where,
            hint="Leave out options such as `--family` and `--crop`, or give them to `ssmprune export`.",
        )


def _read(path: Path, file: Path | None, reading: Reading, precision: str) -> Subject:
    if file is not None:
        make_ready(file)
    start = time.perf_counter()
    if file is not None:
        session = opened(file)
        return Subject(path, session, file.stat().st_size, time.perf_counter() - start)
    model = in_precision(checkpoint.load_as(path, reading), precision)
    return Subject(path, model, checkpoint.size(path), time.perf_counter() - start)


def definition_of(model: Backbone | OnnxSession) -> Backbone:
    """What is counted and what says how images are prepared: the model, or what a file says of its own."""
    if isinstance(model, Backbone):
        return model
    assert isinstance(model.definition, Backbone)
    return model.definition


def session_of(model: Backbone | OnnxSession, device: torch.device) -> Session:
    """What computes the answers."""
    return model if isinstance(model, Session) else prepare(model, device=device)
