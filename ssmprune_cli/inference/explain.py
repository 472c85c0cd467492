"""How a session computes each block, and why: what `Session.explain` returns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

BY_OP = "op by op"


@dataclass(frozen=True)
class Step:
    """Blocks `first` to `last`, counted from 1, and how they are computed.

    how  "one call", "one call a block" and the like, or BY_OP
    why  they are not computed in fewer calls; empty if they cannot be
    """

    first: int
    last: int
    how: str
    why: str = ""

    def __str__(self) -> str:
        blocks = f"block {self.first}" if self.first == self.last else f"blocks {self.first} to {self.last}"
        return f"{blocks}: {self.how}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Explanation:
    """What a session does.

    kind     of the session: "cpu", "cuda_graph" or "plain"
    refused  better kinds, each with the reason why it was not taken
    steps    of a forward pass of one image, in order; none for a model whose blocks are not known
    notes    what concerns the whole model
    """

    kind: str
    refused: dict[str, str]
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"session: {self.kind}"]
        lines += [f"not {kind}: {reason}" for kind, reason in self.refused.items()]
        return "\n".join([*lines, *map(str, self.steps), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Journal(threading.local):
    """Where what runs writes down how, while somebody listens; each thread has its own."""

    def __init__(self) -> None:
        self._steps: list[Step] | None = None

    def __reduce__(self) -> tuple[type[Journal], tuple[()]]:
        return Journal, ()  # a copy of a session has one of its own

    def write(self, first: int, last: int, how: str, why: str = "") -> None:
        """Blocks `first` to `last`, counted from 0, have been computed so."""
        if self._steps is not None:
            self._steps.append(Step(first + 1, last + 1, how, why))

    @contextmanager
    def listening(self) -> Iterator[list[Step]]:
        """Inside, the list grows with what runs in this thread."""
        steps: list[Step] = []
        self._steps = steps
        try:
            yield steps
        finally:
            self._steps = None


def complete(steps: list[Step], blocks: int, silent: str, reasons: dict[int, str]) -> tuple[Step, ...]:
    """`steps` with every block that wrote nothing, which was computed as `silent` says, for `reasons` by block from 0.

    Neighbours that are computed alike become one step, but calls of several blocks stay apart.
    """
    written = {step.first for step in steps}
    covered = {number for step in steps for number in range(step.first, step.last + 1)}
    unwritten = [Step(n, n, silent, reasons.get(n - 1, "")) for n in range(1, blocks + 1) if n not in covered]
    assert len(written) == len(steps), "a block wrote twice"
    ordered = sorted([*steps, *unwritten], key=lambda step: step.first)
    merged: list[Step] = []
    for (how, why), group in groupby(ordered, key=lambda step: (step.how, step.why)):
        alike = list(group)
        if all(step.first == step.last for step in alike):
            merged.append(Step(alike[0].first, alike[-1].last, how, why))
        else:
            merged += alike
    return tuple(merged)
