"""The program as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def ssmprune() -> Run:
    """Runs `ssmprune` with arguments, and environment variables as keywords, from the root of the repository."""

    def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
        # COLUMNS is set where tests run in several processes, and would change the width of tables.
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SSMPRUNE_", "COLUMNS"))}
        return subprocess.run(
            [sys.executable, "-m", "ssmprune_cli", *map(str, arguments)],
            cwd=ROOT,
            env={**kept, "NO_COLOR": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    return run
