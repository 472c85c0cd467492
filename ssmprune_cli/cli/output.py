"""The only place that writes: results to stdout, everything else to stderr.

rich is imported when something is written, so that `--help` stays quick. It leaves colour out for NO_COLOR and pipes,
and draws tables with ASCII where the encoding has nothing better.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from ssmprune_cli.errors import MAX_MESSAGE, SsmpruneError, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

Advance = Callable[[int, int], None]  # (done, total)

PIPE_WIDTH = 80  # columns of a table that does not go to a terminal
INTERVAL = 30.0  # seconds between two lines about long work where there is no terminal to draw a bar on

_quiet = False


def hush() -> None:
    """From now on no notes and no progress: `--quiet`. Results, warnings and errors stay."""
    global _quiet
    _quiet = True


def prepare_streams() -> None:
    """No name or sign that an encoding lacks ends a run: of a file name's bytes that are no UTF-8 come escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if _is_utf(stream) else "replace")


def emit(result: RenderableType, data: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a command's result to stdout: `result` for people, or `data` as JSON."""
    if as_json:
        json_text(data)
    elif _speaks():
        with _to_stdout():
            _console(stderr=False).print(result)


def json_text(data: Mapping[str, Any]) -> None:
    """Write `data` to stdout as one JSON object. Raises ValueError for NaN and infinity, which JSON lacks."""
    ascii_only = sys.stdout is not None and not _is_utf(sys.stdout)
    text(json.dumps(data, indent=2, ensure_ascii=ascii_only, allow_nan=False) + "\n")


def text(content: str) -> None:
    """Write text to stdout as it is."""
    if _speaks():
        with _to_stdout() as stream:
            stream.write(content)


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

    Bars show the estimated time left, and only on a terminal. Elsewhere long work writes a line now and then.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield _lines
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = _quiet or not _speaks()
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


@contextmanager
def kept_for_the_next_run(state: Path | None) -> Iterator[None]:
    """Around work that saves its results to `state`: whoever interrupts it is told how it goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if state is not None and state.is_file():
            warn(f"What was found so far is kept in {state}. To go on, give the same command again.")
        raise


def _lines(description: str) -> Advance:
    """A callback that writes how far the work is, every INTERVAL seconds."""
    start = last = time.monotonic()

    def advance(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= INTERVAL and 0 < done < total:
            last = now
            left = (now - start) * (total - done) / done
            note(f"{description}: {done:,} of {total:,} ({100 * done // total} %), about {_duration(left)} left")

    return advance


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@contextmanager
def _to_stdout() -> Iterator[TextIO]:
    """stdout, which is written out at the end. Raises SsmpruneError if it is closed or takes no more.

    A reader that has gone away (`| head`) is none of it: BrokenPipeError, which ends the program without a word.
    """
    if sys.stdout is None:
        raise SsmpruneError("is closed, so the result cannot be written", where="standard output")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        discard_stdout()
        if error.errno == errno.EPIPE:
            raise
        raise SsmpruneError(f"cannot be written: {error.strerror or error}", where="standard output") from error


def discard_stdout() -> None:
    """What is left to write goes nowhere: at its end Python would try once more, and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _speaks() -> bool:
    """Of several processes on one task (torchrun), the first one speaks; errors come from whoever has one."""
    return os.environ.get("RANK", "0") == "0"


def _message(prefix: str, style: str, message: str) -> None:
    if sys.stderr is None:
        return
    from rich.text import Text

    plain = shown(message, 2 * MAX_MESSAGE, lines=True)
    # soft_wrap: a path or a command in a message can be copied from any terminal width.
    _console(stderr=True).print(Text.assemble((prefix, style), plain), soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # No markup: file names may hold brackets.
    return Console(stderr=stderr, width=_width(stream), markup=False, emoji=False, highlight=False)


def _width(stream: TextIO) -> int | None:
    """Columns to write in: those that COLUMNS says, if it says any; None leaves a terminal's to rich."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isascii() and stated.isdecimal() and int(stated[:6]) > 0:
        return int(stated[:6])
    if not stream.isatty():
        return PIPE_WIDTH
    return (os.get_terminal_size(stream.fileno()).columns or PIPE_WIDTH) if stated else None


def _is_utf(stream: TextIO) -> bool:
    return (stream.encoding or "").lower().startswith("utf")
