"""One mutated file after another, each in little memory and time, and what came of it."""

from __future__ import annotations

import faulthandler
import random
import resource
import signal
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from ssmprune_cli.errors import SsmpruneError
from tests.fuzz.checkpoints import CASES, Seeds

SECONDS = 10
MEMORY = 2 << 30  # bytes above what the process has before the first case


@dataclass
class Outcome:
    """Counts of what came of the cases, and those that broke a rule: kind, seed and traceback."""

    counts: Counter[str] = field(default_factory=Counter)
    broken: list[tuple[str, int, str]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{count:7,}  {name}" for name, count in sorted(self.counts.items())]
        lines += [f"{kind}, seed {seed}:\n{trace}" for kind, seed, trace in self.broken]
        return "\n".join(lines)


class TooSlow(BaseException):
    """A case took more than SECONDS."""


def fuzz(folder: Path, seeds: range, *, stop_at: float | None = None) -> Outcome:
    """Run the case of every seed. Files are written to `folder`.

    stop_at  time (as `time.monotonic`) after which no case begins
    """
    faulthandler.enable()
    healthy = Seeds(folder)
    outcome = Outcome()
    before = signal.signal(signal.SIGALRM, _too_slow)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, limits[1]))
    try:
        for seed in seeds:
            if stop_at is not None and time.monotonic() > stop_at:
                break
            kind, run = CASES[seed % len(CASES)]
            signal.alarm(SECONDS)
            try:
                run(healthy, random.Random(seed), folder)
                outcome.counts[f"{kind}: read"] += 1
            except SsmpruneError as error:
                outcome.counts[f"{kind}: refused"] += 1
                if len(str(error)) > 30_000 or any(ord(each) < 32 and each != "\n" for each in str(error)):
                    outcome.broken.append((kind, seed, f"the message is not fit for a terminal: {str(error)[:300]!r}"))
            except (Exception, TooSlow):
                outcome.counts[f"{kind}: BROKEN"] += 1
                outcome.broken.append((kind, seed, traceback.format_exc(limit=-6)))
            finally:
                signal.alarm(0)
    finally:
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return outcome


def _too_slow(_: int, __: FrameType | None) -> None:
    raise TooSlow(f"more than {SECONDS} seconds")


def _address_space() -> int:
    """Bytes of this process's address space now."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
