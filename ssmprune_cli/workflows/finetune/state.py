"""The state of a training in one file, replaced in one step: a kill at any moment leaves the old one or the new one.

There is no state of random numbers in it: everything random is a function of the seed, the epoch and the step.
"""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ssmprune_cli.errors import CheckpointError, UsageError, listing, shown

STATE, LOG = "state.pt", "log.jsonl"
LAST, BEST = "last", "best"


@dataclass
class Progress:
    """How far a training is: `epoch` epochs and `step` updates of the next one are done.

    loss      sum of the losses of this epoch's updates, skipped ones left out
    skipped   updates skipped for a loss or gradient that was not finite, in all; `in_a_row` just now
    last_loss mean of the last finished epoch's; None if it had no update
    best      highest value of the task's metric, and after which epoch (from 1)
    log_size  bytes of the log that belong to what is done
    epochs    a line of figures for each finished epoch
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    counted: int = 0
    skipped: int = 0
    in_a_row: int = 0
    last_loss: float | None = None
    best: float | None = None
    best_epoch: int | None = None
    log_size: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` to `folder`. Raises CheckpointError; the old state is then as it was."""
    content = io.BytesIO()
    torch.save(state, content)
    temporary = folder / f"{STATE}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / STATE)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _cannot_write(folder, error) from error


def read_state(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The state in `folder`. Raises UsageError if there is none, or `settings` are not those it was made with."""
    path = folder / STATE
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UsageError(
            "there is no training to resume here", where=str(folder), hint="Leave out `--resume` to start one."
        ) from error
    except Exception as error:  # torch.load raises almost anything on a damaged file
        raise CheckpointError(f"cannot be read: {shown(str(error))}", where=str(path)) from error
    own = _settings(state)
    if own is None:
        raise CheckpointError("is not the state of a training", where=str(path))
    now = _flat(json.loads(json.dumps(settings)))
    faults = [
        f"{name} was {shown(str(own.get(name)))} and is {shown(str(now.get(name)))}"
        for name in sorted(now.keys() | own.keys())
        if now.get(name) != own.get(name)
    ]
    if faults:
        raise UsageError(
            f"the training to resume had other settings: {listing(faults)}",
            where=str(path),
            hint="Give the same files and options as before, or train into another folder.",
        )
    return state


def _settings(state: object) -> dict[str, Any] | None:
    """What a state was made with, by flat names; None if it is none of ours."""
    if (
        not isinstance(state, dict)
        or not {"settings", "progress", "model", "optimizer", "ema", "scaler"} <= state.keys()
    ):
        return None
    try:
        values = json.loads(state["settings"])
    except (TypeError, ValueError, RecursionError):
        return None
    return _flat(values) if isinstance(values, dict) else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by names such as "start config depth", so that a message names what differs and no more."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{name} "))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def prepare_folder(folder: Path, needed: int, *, resume: bool) -> None:
    """Make `folder`. CheckpointError if it cannot be written, has less than `needed` bytes of room, or is in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not resume and any(folder.iterdir()):
            raise CheckpointError(
                "the folder is not empty", where=str(folder), hint="Choose another folder, or give `--resume`."
            )
        probe = folder / f"{STATE}.tmp"
        probe.write_bytes(b"\0")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if free < needed:
        raise CheckpointError(
            f"the disk has {free / 1e6:.0f} MB left, and the training needs {needed / 1e6:.0f} MB", where=str(folder)
        )


class Log:
    """JSON lines, appended one at a time."""

    def __init__(self, folder: Path, size: int) -> None:
        """What lies beyond `size` bytes is what a killed training did after its last state: it will be done again."""
        self._path = folder / LOG
        try:
            self._path.touch()
            os.truncate(self._path, min(size, self._path.stat().st_size))
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def write(self, values: dict[str, Any]) -> int:
        """Append a line; the size of the log."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
            return self._path.stat().st_size
        except OSError as error:
            raise _cannot_write(self._path, error) from error


def _cannot_write(path: Path, error: OSError) -> CheckpointError:
    what = "the disk is full" if error.errno == errno.ENOSPC else f"cannot be written: {error.strerror}"
    return CheckpointError(what, where=str(path))
