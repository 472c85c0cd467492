"""A registry of named things: model families, scores, reductions, alignment sources, kernels, datasets."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ssmprune_cli.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to values, in order of registration. `kind` is how messages call one entry, such as "importance score"."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}
        self._more: Callable[[Registry[T]], None] | None = None

    def when_read(self, more: Callable[[Registry[T]], None]) -> None:
        """Let `more` register what comes from outside, once, before this is first read."""
        self._more = more

    def _all(self) -> dict[str, T]:
        if self._more is not None:
            more, self._more = self._more, None  # first, as `more` reads the registry too
            more(self)
        return self._entries

    def register(self, name: str, value: T) -> T:
        """Add `value` under `name`. Raises ValueError if the name is taken (a programming error)."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._entries[name] = value
        return value

    def get(self, name: str) -> T:
        """The value of `name`. Raises UsageError with the known names and the closest one."""
        if name in self._all():
            return self._entries[name]
        close = difflib.get_close_matches(name, self._entries, n=1)
        guess = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"unknown {self.kind} {name!r}.{guess}", hint=f"Known: {', '.join(self.names())}.")

    def names(self) -> tuple[str, ...]:
        return tuple(self._all())

    def items(self) -> Iterator[tuple[str, T]]:
        return iter(self._all().items())

    def __contains__(self, name: object) -> bool:
        return name in self._all()
