"""The program: runs a command, and turns what goes wrong into a message and an exit code.

0 done; 1 an error; 2 wrong usage; 3 a limit that the user set is broken; 130 interrupted.
"""

from __future__ import annotations

import io
import sys
import traceback
from typing import NoReturn

from ssmprune_cli.cli import output
from ssmprune_cli.cli.allocator import keep_freed_memory
from ssmprune_cli.cli.app import app, settings
from ssmprune_cli.errors import SsmpruneError

INTERRUPTED = 130  # what a shell reports for Ctrl-C


def main() -> NoReturn:
    """Run `ssmprune` with the arguments of this process, and exit."""
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that is no text, or a sign that a narrow encoding lacks, ends no run.
            wide = stream.encoding.lower().startswith("utf")
            stream.reconfigure(errors="backslashreplace" if wide else "replace")
    try:
        app(prog_name="ssmprune")
    except SystemExit as end:
        if end.code == INTERRUPTED:
            output.error("interrupted")
        raise
    except Exception as error:
        if settings.debug:
            traceback.print_exc()
        sys.exit(_explain(error))
    sys.exit(0)


def _explain(error: Exception) -> int:
    """Print what went wrong; the exit code."""
    if isinstance(error, SsmpruneError):
        output.error(f"{error.where}: {error.what}" if error.where else error.what, hint=error.hint)
        return error.exit_code
    if isinstance(error, OSError) and error.filename is not None:
        output.error(f"{error.filename}: {error.strerror}")
        return 1
    output.error(
        f"this is a bug in ssmprune: {type(error).__name__}: {error}",
        hint="Run `ssmprune --debug ...` again and report the traceback with the output of `ssmprune env`.",
    )
    return 1
