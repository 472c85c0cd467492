"""The program as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

# Imports what commands import, which takes longer than most of them, and runs each command in a process forked off, in
# a session of its own. Answers with its number at once, and with its exit code when it has ended.
SERVER = """
import importlib, json, os, pkgutil, sys
import accelerate, fvcore.nn, jinja2, numpy, PIL.Image, rich.progress, rich.table, rich.text, torch, ssmprune_cli
from ssmprune_cli.cli.main import main
from tests import steady_clock

for each in pkgutil.walk_packages(ssmprune_cli.__path__, "ssmprune_cli."):
    if "__main__" not in each.name and "triton" not in each.name:
        importlib.import_module(each.name)
for line in sys.stdin:
    arguments, files, environment, steady = json.loads(line)
    streams = [os.open(path, os.O_RDWR | os.O_NOCTTY) for path in (os.devnull, *files)]
    child = os.fork()
    if child == 0:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        for name, value in environment.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
        encoding = environment.get("PYTHONIOENCODING")
        sys.stdout, sys.stderr = (open(number, "w", encoding=encoding) for number in (1, 2))
        if steady:
            steady_clock.install(setattr)
        sys.argv = ["ssmprune", *arguments]
        code = 1
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for stream in streams:
        os.close(stream)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Process:
    """A command that runs, in a process group of its own."""

    arguments: tuple[str, ...]
    pid: int
    out: Path
    err: Path
    answers: IO[str]

    def ended(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = int(self.answers.readline())
        out, err = (file.read_bytes().decode() if file.is_file() else "" for file in (self.out, self.err))
        return subprocess.CompletedProcess(["ssmprune", *self.arguments], code, out, err)


Start = Callable[..., Process]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `ssmprune` with arguments from the root of the repository, in a process that has not to import anything.

    Keywords are environment variables, and None removes one; `terminal` is a device to write to. With `steady`,
    searches are timed by tests/steady_clock.py. One runs at a time.
    """
    folder = tmp_path_factory.mktemp("streams")
    # COLUMNS is set where tests run in several processes, and would change the width of tables.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SSMPRUNE_", "COLUMNS"))}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env={**kept, "NO_COLOR": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        sent, answers = server.stdin, server.stdout

        def start(
            *arguments: str | Path, terminal: Path | None = None, steady: bool = False, **environment: str | None
        ) -> Process:
            files = [terminal or folder / name for name in ("out", "err")]
            for file in files if terminal is None else ():
                file.write_bytes(b"")
            words = tuple(map(str, arguments))
            sent.write(json.dumps([words, list(map(str, files)), environment, steady]) + "\n")
            sent.flush()
            return Process(words, int(answers.readline()), *files, answers)

        yield start


@pytest.fixture(scope="session")
def ssmprune(start: Start) -> Run:
    """Runs `ssmprune` to its end: arguments and keywords are those of `start`."""

    def run(*arguments: str | Path, steady: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        return start(*arguments, steady=steady, **environment).wait()

    return run
