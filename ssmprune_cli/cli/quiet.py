"""`--quiet`, which every command takes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import OUTPUT

_Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        help="No notes and no progress on stderr; warnings and errors stay.",
        is_eager=True,
        rich_help_panel=OUTPUT,
    ),
]


def quietly(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the option `--quiet` after its own: Typer reads options off the signature."""

    @functools.wraps(command)
    def run(*arguments: Any, quiet: bool, **options: Any) -> None:
        if quiet:
            output.hush()
        command(*arguments, **options)

    signature = inspect.signature(command, eval_str=True)
    own = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    parameters = [*signature.parameters.values(), own]
    run.__dict__["__signature__"] = signature.replace(parameters=parameters)
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run
