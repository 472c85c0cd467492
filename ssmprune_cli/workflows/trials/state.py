"""Results that outlive a kill: each is written to a file as soon as it is known, and read back by the next run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ssmprune_cli.errors import SsmpruneError, UsageError, listing, shown
from ssmprune_cli.files import read_bytes
from ssmprune_cli.workflows.write import write_text

Value = TypeVar("Value")
_MOST_BYTES = 1 << 28  # of the divergences of every image in a long search


class SavedState:
    """Results by key. `identity` (what JSON knows) says what they are results of: a file of something else is refused.

    Without a path nothing is written. A deterministic computation that asks here for every costly result continues
    where it was killed: it runs again from the start, and what is known costs nothing.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))  # tuples become lists, as in the file
        self._results: dict[str, Any] = {}
        self.found = 0
        if path is None or not path.exists():
            return
        theirs, self._results = _read(path)
        different = sorted(key for key in self._identity | theirs if self._identity.get(key) != theirs.get(key))
        if different:
            raise UsageError(
                f"is the state of another run: {listing(different)} differ",
                where=str(path),
                hint="Delete it to start anew, or name another file with `--state`.",
            )
        self.found = len(self._results)

    def get(self, key: str, compute: Callable[[], Value]) -> Value:
        """The result of `key` (plain values that JSON knows), computed and saved if it is not known yet."""
        if key not in self._results:
            self._results[key] = compute()
            self._save()
        value: Value = self._results[key]
        return value

    def remove(self) -> None:
        """Delete the file: the run is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _save(self) -> None:
        if self.path is not None:
            write_text(self.path, json.dumps({"identity": self._identity, "results": self._results}))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Identity and results in the file of a user. Raises SsmpruneError for whatever is none of ours."""
    content = read_bytes(path, _MOST_BYTES, SsmpruneError)
    reason = "it has no `identity` and `results` by name"
    try:
        values = json.loads(content.decode("utf-8"))
        if isinstance(values, dict) and all(isinstance(values.get(key), dict) for key in ("identity", "results")):
            return values["identity"], values["results"]
    except (ValueError, RecursionError, MemoryError) as error:
        reason = shown(str(error)) or type(error).__name__
    raise SsmpruneError(
        f"cannot be read as the state of an earlier run: {reason}",
        where=str(path),
        hint="Delete it to start anew, or name another file with `--state`.",
    )
