"""`python -m tests.fuzz [SECONDS] [FIRST SEED]`: for so long; prints the counts; exits with 1 if a rule is broken."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import fuzz


def main(seconds: float = 60, first: int = 0) -> int:
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(Path(folder), range(first, first + 10**9), stop_at=time.monotonic() + seconds)
    sys.stdout.write(f"{outcome}\n{sum(outcome.counts.values()):,} cases, {len(outcome.broken):,} broken\n")
    return 1 if outcome.broken else 0


if __name__ == "__main__":
    sys.exit(main(*(int(argument) for argument in sys.argv[1:])))
