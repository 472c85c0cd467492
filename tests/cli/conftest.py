"""The program as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]

# Imports what commands import, which takes longer than most of them, and runs each command in a process forked off.
SERVER = """
import importlib, json, os, pkgutil, sys
import accelerate, fvcore.nn, jinja2, numpy, PIL.Image, rich.progress, rich.table, rich.text, torch, ssmprune_cli
from ssmprune_cli.cli.main import main

for each in pkgutil.walk_packages(ssmprune_cli.__path__, "ssmprune_cli."):
    if "__main__" not in each.name and "triton" not in each.name:
        importlib.import_module(each.name)
for line in sys.stdin:
    arguments, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, path in ((0, os.devnull), (1, out), (2, err)):
            os.dup2(os.open(path, os.O_RDWR), number)
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
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def _environment(**more: str) -> dict[str, str]:
    # COLUMNS is set where tests run in several processes, and would change the width of tables.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SSMPRUNE_", "COLUMNS"))}
    return {**kept, "NO_COLOR": "1", **more}


@pytest.fixture(scope="session")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Runs `ssmprune` with arguments in a process that has not to import anything."""
    folder = tmp_path_factory.mktemp("streams")
    files = [folder / "out", folder / "err"]
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=_environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        sent, answers = server.stdin, server.stdout

        def run(*arguments: str) -> subprocess.CompletedProcess[str]:
            for file in files:
                file.write_bytes(b"")
            sent.write(json.dumps([arguments, *map(str, files)]) + "\n")
            sent.flush()
            code = int(answers.readline())
            out, err = (file.read_bytes().decode() for file in files)
            return subprocess.CompletedProcess(["ssmprune", *arguments], code, out, err)

        yield run


@pytest.fixture(scope="session")
def ssmprune(forked: Run) -> Run:
    """Runs `ssmprune` with arguments, and environment variables as keywords, from the root of the repository."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        if not environment:
            return forked(*map(str, arguments))
        return subprocess.run(
            [sys.executable, "-m", "ssmprune_cli", *map(str, arguments)],
            cwd=ROOT,
            env=_environment(**environment),
            capture_output=True,
            text=True,
            check=False,
        )

    return run
