"""Errors that a user can act on: what is wrong, where, and what to type next."""

from __future__ import annotations

from collections.abc import Iterable

MAX_MESSAGE = 8000  # characters of each part of a message
MAX_NAME = 160  # characters of a name or value out of a file


def shown(text: str, limit: int = MAX_NAME, *, lines: bool = False) -> str:
    """`text` out of a file, fit for a terminal: cut after `limit` characters, control characters as escapes.

    So are bytes of a file name that are no UTF-8. With `lines`, line breaks stay.
    """
    cut = text if len(text) <= limit else f"{text[:limit]}... ({len(text) - limit:,} more characters)"
    plain = (each if each.isprintable() or (lines and each == "\n") else ascii(each)[1:-1] for each in cut)
    return "".join(plain)


def listing(items: Iterable[object], limit: int = 5) -> str:
    """The first `limit` of `items` and how many more there are, for a message.

    An item may be more than one name, such as a name and what is wrong with it.
    """
    names = list(items)
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(shown(str(name), 2 * MAX_NAME) for name in names[:limit]) + more


class SsmpruneError(Exception):
    """An error of ours, shown as one message without a traceback.

    `what` says what is wrong, `where` names the file, key or option, and `hint` says what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = shown(what, MAX_MESSAGE, lines=True)
        self.where = None if where is None else shown(where, MAX_MESSAGE)
        self.hint = None if hint is None else shown(hint, MAX_MESSAGE, lines=True)

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n{self.hint}" if self.hint else message


class UsageError(SsmpruneError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class BudgetError(UsageError):
    """What is asked for cannot be had of this model on this device: in so little time, or with so few multiply-adds."""


class LimitError(SsmpruneError):
    """A limit that the user set (such as `--max-drop`) is broken; the result itself is valid."""

    exit_code = 3


class CheckpointError(SsmpruneError):
    """A checkpoint or artefact cannot be read, recognised or written."""


class UnknownFamilyError(CheckpointError):
    """A checkpoint is sound, and of no family that is known."""


class RecipeError(SsmpruneError):
    """A recipe is not valid; the message lists every fault, one a line."""


class DataError(SsmpruneError):
    """Images or labels cannot be read or do not fit the model."""


class KernelError(SsmpruneError):
    """A kernel backend is missing or refuses its input."""
