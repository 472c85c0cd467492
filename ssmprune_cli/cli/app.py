"""The command line: every command by name. Commands import torch only when they run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from ssmprune_cli import __version__
from ssmprune_cli.cli import (
    compare,
    compress,
    env,
    finetune,
    inspect,
    output,
    profile,
    recipes,
    report,
    search,
    sensitivity,
    visualize,
)
from ssmprune_cli.cli import eval as evaluate


@dataclass
class Settings:
    """Global options."""

    debug: bool = False


settings = Settings()

# Plain help: it is twice as quick as rich's, and shows brackets as they are written.
app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        output.text(f"ssmprune {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error.", envvar="SSMPRUNE_DEBUG")
    ] = False,
) -> None:
    """Make pretrained vision state space models cheaper by dropping tokens."""
    settings.debug = debug


app.command("compress")(compress.command)
app.command("search")(search.command)
app.command("sensitivity")(sensitivity.command)
app.command("compare")(compare.command)
app.command("eval")(evaluate.command)
app.command("profile")(profile.command)
app.command("inspect")(inspect.command)
app.command("report")(report.command)
app.command("visualize")(visualize.command)
app.command("finetune")(finetune.command)
app.add_typer(recipes.app, name="recipes")
app.command("env")(env.command)
