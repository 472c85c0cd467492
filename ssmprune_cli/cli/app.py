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
    export,
    finetune,
    inspect,
    models,
    output,
    profile,
    recipes,
    report,
    search,
    sensitivity,
    visualize,
)
from ssmprune_cli.cli import eval as evaluate
from ssmprune_cli.cli.help import Command
from ssmprune_cli.cli.quiet import quietly


@dataclass
class Settings:
    """Global options."""

    debug: bool = False


settings = Settings()

# Plain help: it is twice as quick as rich's, and shows brackets as they are written.
app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},  # commands inherit it
)


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


for _name, _function in (
    ("compress", compress.command),
    ("search", search.command),
    ("sensitivity", sensitivity.command),
    ("compare", compare.command),
    ("export", export.command),
    ("eval", evaluate.command),
    ("profile", profile.command),
    ("inspect", inspect.command),
    ("report", report.command),
    ("visualize", visualize.command),
    ("finetune", finetune.command),
    ("env", env.command),
):
    app.command(_name, cls=Command)(quietly(_function))
app.add_typer(recipes.app, name="recipes")
app.add_typer(models.app, name="models")
