"""`--module PACKAGE:FUNCTION`: compress, profile and eval of a user's own module."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import INPUT
from ssmprune_cli.errors import UsageError
from ssmprune_cli.preprocessing import Reading

if TYPE_CHECKING:
    from ssmprune_cli.workflows.compress import CompressRequest
    from ssmprune_cli.workflows.evaluate import Evaluation
    from ssmprune_cli.workflows.measure import Speed
    from ssmprune_cli.workflows.own_module import ModuleSource

ModuleName = Annotated[
    str | None,
    typer.Option(
        "--module",
        metavar="PACKAGE:FUNCTION",
        help="A module of your own, that this function returns: imports and runs your code. The weights are loaded "
        "into it.",
        rich_help_panel=INPUT,
    ),
]
_READING = tuple(each.name for each in fields(Reading))
_EVERYWHERE = (*_READING, "module", "as_json", "batch_size", "device", "backend")
_METHOD = ("keep", "tokens", "points", "recipe", "overrides", "importance", "reduction", "alignment", "seed")
COMPRESS = (*_EVERYWHERE, "ckpt", *_METHOD, "calib", "calib_images", "out", "overwrite")
PROFILE = (*_EVERYWHERE, "path", "rounds")
EVAL = (*_EVERYWHERE, "path", "dataset", "data", "limit")


def refuse_others(context: typer.Context, allowed: Collection[str]) -> None:
    """UsageError for an option that was typed and means nothing for a module of the user's own."""
    for parameter in context.command.params:
        name = str(parameter.name)
        source = context.get_parameter_source(name)
        if name not in allowed and source is not None and source.name == "COMMANDLINE":
            raise UsageError("does not go with --module: it is for models of ours", where=parameter.opts[0])


@contextmanager
def _to_stderr() -> Iterator[None]:
    """What the user's code prints is no result."""
    with redirect_stdout(sys.stderr):
        yield


def compress(request: CompressRequest, module: str, *, as_json: bool) -> None:
    from ssmprune_cli.workflows.own_module import compress_module

    with output.task_progress() as progress, _to_stderr():
        done = compress_module(request, module, progress)
    for warning in done.warnings:
        output.warn(warning)
    pruning = done.pruning
    points = ", ".join(map(str, pruning["schedule"]["points"]))
    distances = ", ".join(f"{name} {value:.4g}" for name, value in done.distances.items())
    mixers = " and ".join(f"{count} {kind}" for kind, count in done.kinds.items())
    protected = ", ".join(map(str, done.protected)) or "none"
    lines = [
        f"Mixers: {mixers}. Prune points after {points} of them; importance {pruning['importance']}, reduction "
        f"{pruning['reduction']}, alignment {pruning['alignment']}. Positions that always stay: {protected}.",
        f"Distance from the dense answers on {done.images} images, by what stands at the places of dropped tokens: "
        f"{distances}. Taken: {done.fill}.",
    ]
    tables = (_times(f"{done.path}, batch {done.batch_size}", done.speeds), _tokens(done.tokens))
    output.emit(Group(*tables, *lines), done.to_dict(), as_json=as_json)
    output.note(f"Written to {done.out}")


def profile(source: ModuleSource, *, batch_size: int | None, rounds: int, as_json: bool) -> None:
    from ssmprune_cli.workflows.own_module import profile_module

    with output.progress("Timing") as advance, _to_stderr():
        found = profile_module(source, batch_size=batch_size, rounds=rounds, progress=advance)
    for warning in found.warnings:
        output.warn(warning)
    title = (
        f"{found.path}: {found.parameters:,} parameters; {found.image_size} x {found.image_size} pixels, batch "
        f"{found.batch_size}, {found.dtype}, {found.device}, {found.threads} threads, kernels: {found.backend}"
    )
    tables = [_times(title, found.speeds, found.peak_memory_bytes)]
    if found.tokens is not None:
        tables.append(_tokens(found.tokens))
    output.emit(Group(*tables), found.to_dict(), as_json=as_json)


def evaluate(
    source: ModuleSource, data: Path, dataset: str, *, limit: int | None, batch_size: int | None
) -> tuple[Evaluation, list[str]]:
    """The result, and the names of what was judged."""
    from ssmprune_cli.workflows.own_module import evaluate_module

    with output.progress("Evaluating") as advance, _to_stderr():
        result, warnings = evaluate_module(source, data, dataset, limit=limit, batch_size=batch_size, progress=advance)
    for warning in (*warnings, *result.notes):
        output.warn(warning)
    return result, [source.path.name, *([] if result.comparison is None else ["dense"])]


def _times(title: str, speeds: dict[str, Speed], memory: dict[str, int] | None = None) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "ms a batch", "quartiles", "images per second", "of the first", *(["MiB"] if memory else [])):
        table.add_column(column, justify="right" if column else "left")
    first = next(iter(speeds.values())).median_ms
    for name, speed in speeds.items():
        low, high = speed.quartiles_ms
        cells = [f"{speed.median_ms:.2f}", f"{low:.2f} to {high:.2f}", f"{speed.images_per_second:.1f}"]
        cells.append(f"{speed.median_ms / first:.3f}")
        table.add_row(name, *cells, *([f"{memory[name] / 2**20:.1f}"] if memory else []))
    return table


def _tokens(tokens: dict[str, int]) -> Table:
    table = Table(title="Tokens entering each mixer", title_justify="left")
    table.add_column("mixer", overflow="fold")
    table.add_column("tokens", justify="right")
    for name, count in tokens.items():
        table.add_row(name, str(count))
    return table
