"""The program as a process."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

# Imports what commands import, which takes longer than most of them, and runs each command in a process forked off, in
# a session of its own. What it reads is a command to start, which it answers with a number, or the number of a process
# and whether to wait for it, which it answers with an exit code, or null while there is none.
SERVER = """
import importlib, json, os, pkgutil, signal, sys
import accelerate, jinja2, numpy, PIL.Image, rich.progress, rich.table, rich.text, torch, ssmprune_cli
from ssmprune_cli.cli.main import main
from ssmprune_cli.workflows.reporting.page import template
from tests import steady_clock

for each in pkgutil.walk_packages(ssmprune_cli.__path__, "ssmprune_cli."):
    if "__main__" not in each.name and "triton" not in each.name:
        importlib.import_module(each.name)
template()
# On the meta device they import, for a second, what the loading of a pruned model does.
for each in (torch.nn.functional.silu, torch.nn.functional.softplus):
    each(torch.empty(1, device="meta"))


def start(arguments, files, environment, steady):
    streams = [os.open(path, os.O_RDWR | os.O_NOCTTY) for path in (os.devnull, *files)]
    child = os.fork()
    if child:
        for stream in streams:
            os.close(stream)
        return child
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored in the background
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


codes = {}
for line in sys.stdin:
    asked = json.loads(line)
    if len(asked) == 4:
        answer = start(*asked)
    else:
        pid, wait = asked
        if pid not in codes:
            ended, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        answer = codes.get(pid)
    print(json.dumps(answer), flush=True)
"""


@dataclass(frozen=True)
class Process:
    """A command that runs, in a process group of its own. `ask` asks the server."""

    arguments: tuple[str, ...]
    pid: int
    out: Path
    err: Path
    ask: Callable[..., int | None]

    def ended(self) -> bool:
        return self.ask(self.pid, False) is not None

    def wait(self) -> subprocess.CompletedProcess[str]:
        code = self.ask(self.pid, True)
        assert code is not None
        out, err = (file.read_bytes().decode() if file.is_file() else "" for file in (self.out, self.err))
        return subprocess.CompletedProcess(["ssmprune", *self.arguments], code, out, err)


Start = Callable[..., Process]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Starts `ssmprune` with arguments from the root of the repository, in a process that has not to import anything.

    Keywords are environment variables, and None removes one; `terminal` is a device to write to. With `steady`,
    searches are timed by tests/steady_clock.py.
    """
    folder, numbers = tmp_path_factory.mktemp("streams"), itertools.count()
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

        def ask(*words: object) -> int | None:
            sent.write(json.dumps(words) + "\n")
            sent.flush()
            answer: int | None = json.loads(answers.readline())
            return answer

        def start(
            *arguments: str | Path, terminal: Path | None = None, steady: bool = False, **environment: str | None
        ) -> Process:
            number, words = next(numbers), tuple(map(str, arguments))
            files = [terminal or folder / f"{number}.{name}" for name in ("out", "err")]
            for file in files if terminal is None else ():
                file.touch()
            pid = ask(words, list(map(str, files)), environment, steady)
            assert pid is not None
            return Process(words, pid, files[0], files[1], ask)

        yield start


@pytest.fixture(scope="session")
def ssmprune(start: Start) -> Run:
    """Runs `ssmprune` to its end: arguments and keywords are those of `start`."""

    def run(*arguments: str | Path, steady: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        return start(*arguments, steady=steady, **environment).wait()

    return run
