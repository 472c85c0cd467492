"""The program: runs a command, and turns what goes wrong into a message and an exit code.

0 done; 1 an error; 2 wrong usage; 3 a limit that the user set is broken; 130 interrupted; 143 terminated (SIGTERM).
"""

from __future__ import annotations

import signal
import sys
import traceback
import warnings
from types import FrameType
from typing import Any, NoReturn

from ssmprune_cli.cli import output
from ssmprune_cli.cli.allocator import keep_freed_memory
from ssmprune_cli.cli.app import app, settings
from ssmprune_cli.errors import SsmpruneError
from ssmprune_cli.plugins import PluginWarning

INTERRUPTED = 128 + signal.SIGINT  # what a shell reports for Ctrl-C
TERMINATED = 128 + signal.SIGTERM

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory")  # in the errors of torch's allocators

_terminated = False


def main() -> NoReturn:
    """Run `ssmprune` with the arguments of this process, and exit."""
    keep_freed_memory()
    output.prepare_streams()
    signal.signal(signal.SIGTERM, _terminate)
    warnings.filterwarnings("ignore", module="PIL")  # about metadata of images: what matters there is an error
    warnings.showwarning = _show_warning
    code: int | str | None = 0
    try:
        app(prog_name="ssmprune")
    except SystemExit as end:
        code = end.code
        if code == INTERRUPTED and _terminated:
            code = TERMINATED
    except KeyboardInterrupt:  # before or after the command
        code = TERMINATED if _terminated else INTERRUPTED
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        code = explain(error)
    if code in (INTERRUPTED, TERMINATED):
        output.error("interrupted" if code == INTERRUPTED else "terminated")
    sys.exit(code)


def _terminate(number: int, frame: FrameType | None) -> None:
    """SIGTERM is Ctrl-C with another exit code: what a command does at its end is done, such as removing its files."""
    global _terminated
    _terminated = True
    raise KeyboardInterrupt


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any
) -> None:
    """A warning of ours without the line of code that it comes from; any other as Python shows it."""
    if issubclass(category, PluginWarning):
        output.warn(str(message))
    elif sys.stderr is not None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))


def explain(error: Exception) -> int:
    """Print what went wrong; the exit code."""
    if isinstance(error, SsmpruneError):
        output.error(f"{error.where}: {error.what}" if error.where else error.what, hint=error.hint)
        return error.exit_code
    if isinstance(error, OSError):  # of the machine: a full disk, a name that is too long, too many open files
        reason = error.strerror or str(error)
        output.error(reason if error.filename is None else f"{error.filename}: {reason}")
        return 1
    if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
        output.error(
            "out of memory", hint="Give a smaller --batch-size or fewer images, or use a machine with more memory."
        )
        return 1
    output.error(
        f"this is a bug in ssmprune: {type(error).__name__}: {error}",
        hint="Run `ssmprune --debug ...` again and report the traceback with the output of `ssmprune env`.",
    )
    return 1
