"""Errors that a user can act on: what is wrong, where, and what to type next."""

from __future__ import annotations


class SsmpruneError(Exception):
    """An error of ours, shown as one message without a traceback.

    `what` says what is wrong, `where` names the file, key or option, and `hint` says what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        message = f"{self.where}: {self.what}" if self.where else self.what
        return f"{message}\n{self.hint}" if self.hint else message


class UsageError(SsmpruneError):
    """The command line asks for something that does not exist or does not fit together."""

    exit_code = 2


class LimitError(SsmpruneError):
    """A limit that the user set (such as `--max-drop`) is broken; the result itself is valid."""

    exit_code = 3


class CheckpointError(SsmpruneError):
    """A checkpoint or artefact cannot be read, recognised or written."""


class RecipeError(SsmpruneError):
    """A recipe is not valid; the message lists every fault, one a line."""


class DataError(SsmpruneError):
    """Images or labels cannot be read or do not fit the model."""


class KernelError(SsmpruneError):
    """A kernel backend is missing or refuses its input."""
