"""The only place that writes: results to stdout, everything else to stderr.

rich is imported when something is written, so that `--help` stays quick. It leaves colour out for NO_COLOR and pipes,
and draws tables with ASCII where the encoding has nothing better.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Advance = Callable[[int, int], None]  # (done, total)

PIPE_WIDTH = 80  # columns of a table that does not go to a terminal

_quiet = False


def hush() -> None:
    """From now on no notes and no progress: `--quiet`. Results, warnings and errors stay."""
    global _quiet
    _quiet = True


def emit(result: RenderableType, data: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a command's result to stdout: `result` for people, or `data` as JSON."""
    if as_json:
        json_text(data)
    elif _speaks():
        _console(stderr=False).print(result)


def json_text(data: Mapping[str, Any]) -> None:
    """Write `data` to stdout as one JSON object. Raises ValueError for NaN and infinity, which JSON lacks."""
    text(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def text(content: str) -> None:
    """Write text to stdout as it is."""
    if _speaks():
        sys.stdout.write(content)


def note(message: str) -> None:
    if _speaks() and not _quiet:
        _message("", "", message)


def warn(message: str) -> None:
    _message("warning: ", "yellow", message)


def error(message: str, *, hint: str | None = None) -> None:
    _message("error: ", "bold red", message)
    if hint:
        _message("hint: ", "bold", hint)


@contextmanager
def task_progress() -> Iterator[Callable[[str], Advance]]:
    """Gives a function that starts a progress bar of a name and returns its (done, total) callback.

    Bars show the estimated time left, and only on a terminal.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = _quiet or not (sys.stderr.isatty() and _speaks())
    with Progress(*columns, console=_console(stderr=True), transient=True, disable=hidden) as bars:

        def start(description: str) -> Advance:
            task = bars.add_task(description, total=None)

            def advance(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            return advance

        yield start


@contextmanager
def progress(description: str) -> Iterator[Advance]:
    """One progress bar: gives its (done, total) callback."""
    with task_progress() as start:
        yield start(description)


def _speaks() -> bool:
    """Of several processes on one task (torchrun), the first one speaks; errors come from whoever has one."""
    return os.environ.get("RANK", "0") == "0"


def _message(prefix: str, style: str, message: str) -> None:
    from rich.text import Text

    # soft_wrap: a path or a command in a message can be copied from any terminal width.
    _console(stderr=True).print(Text.assemble((prefix, style), message), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    # No markup: file names may hold brackets.
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
