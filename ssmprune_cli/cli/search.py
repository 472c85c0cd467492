"""`ssmprune search`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ssmprune_cli.cli import output, values
from ssmprune_cli.cli.help import DATA, DEVICE, OUTPUT
from ssmprune_cli.cli.options import (
    AsJson,
    BackendName,
    DeviceName,
    Evaluations,
    Int8,
    KeepBlocks,
    KeepImageSize,
    RepairKind,
    StateFile,
    TimedBatch,
    TimeLimit,
    choice_option,
    importance_option,
    ratios_option,
    reads_checkpoints,
    reduction_option,
    seed_option,
    split,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.table import Table

    from ssmprune_cli.workflows.search import Found, SearchResult


@reads_checkpoints
def command(
    ckpt: Annotated[Path, typer.Argument(help="The checkpoint, as its authors published it.")],
    calib: Annotated[
        Path,
        typer.Option(
            help="Unlabelled images to search on: a folder, a tree of folders or an .npz.", rich_help_panel=DATA
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for a recipe a budget, search.json and front.svg.", rich_help_panel=OUTPUT)
    ],
    times: Annotated[
        str | None,
        ratios_option("--times", "Budgets: shares of the dense model's time on --device [default: 0.8,0.7,0.6,0.5]."),
    ] = None,
    flops: Annotated[
        str | None, ratios_option("--flops", "Instead: shares of the dense multiply-adds, all directions counted.")
    ] = None,
    importance: Annotated[str | None, importance_option("Only this score [default: the search chooses]")] = None,
    reduction: Annotated[str | None, reduction_option("Only this reduction [default: the search chooses]")] = None,
    alignment: Annotated[
        str | None,
        choice_option("--alignment", values.ALIGNMENTS, "Only this alignment [default: the search chooses]"),
    ] = None,
    repair: RepairKind = None,
    seed: Annotated[int, seed_option("Seed of the search and of the choice of images.")] = 0,
    int8: Int8 = False,
    keep_image_size: KeepImageSize = False,
    keep_blocks: KeepBlocks = False,
    evaluations: Evaluations = 200,
    time_limit: TimeLimit = None,
    calib_images: Annotated[
        int, typer.Option(min=1, help="How many of the images to use.", rich_help_panel=DATA)
    ] = 256,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier search.", rich_help_panel=OUTPUT)
    ] = False,
    state: StateFile = None,
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    batch_size: TimedBatch = None,
    images_at_once: Annotated[
        int,
        typer.Option(min=1, help="Images that are judged at once; more suit a GPU.", rich_help_panel=DEVICE),
    ] = 16,
    device: DeviceName = "cpu",
    backend: BackendName = "auto",
) -> None:
    """Find the best recipe for each of several budgets: the front of divergence against time or multiply-adds.

    Image side, blocks, points, token counts, score, reduction and alignment are chosen by the divergence of the
    logits from the dense model's on unlabelled images. A part of them is held back: what is to stay without a
    repair takes the place of the uniform default only if it is clearly better there. With 64 images or more the
    finalists are judged as they will be repaired, with 106 or more every candidate is, and fewer blocks are tried.
    `ssmprune compress --recipe` then makes the model. A run that was killed continues with the same command.
    """
    if times is not None and flops is not None:
        raise UsageError("--times and --flops are two kinds of budgets: give one of them")
    kind: Literal["time", "flops"] = "time" if flops is None else "flops"
    shares = split(flops or times or "0.8,0.7,0.6,0.5")

    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.pruning import known_methods
    from ssmprune_cli.recipe import CalibrationPlan
    from ssmprune_cli.workflows.search import Limits, SearchPlan, search_to_folder, state_file
    from ssmprune_cli.workflows.source import Source
    from ssmprune_cli.workflows.trials import Budget

    use_backend(backend)
    plan = SearchPlan(
        calib=calib,
        methods=list(known_methods(importance, reduction, alignment)),
        budgets=tuple(Budget(kind, value) for value in shares),
        batch_size=batch_size,
        repair=repair or "auto",
        resize=not keep_image_size,
        cut=not keep_blocks,
        calibration=CalibrationPlan(images=calib_images, seed=seed, batch_size=images_at_once),
        seed=seed,
        limits=Limits(evaluations, time_limit),
        device=device,
        state=state,
        int8=int8,
    )
    with output.task_progress() as progress, output.kept_for_the_next_run(state or state_file(out)):
        result = search_to_folder(Source(ckpt, reading), plan, out, overwrite=overwrite, progress=progress)
    for warning in result.warnings:
        output.warn(warning)
    trace = [entry for found in result.found for entry in found.trace()]
    output.emit(
        _table(ckpt.name, result),
        {"found": [each.model_dump(mode="json") for each in trace if each.chosen]},
        as_json=as_json,
    )
    output.note(f"Written to {out}")


def _table(name: str, result: SearchResult) -> Table:
    from rich.table import Table

    table = Table(
        title=f"{name}: the best of each budget (divergence in {result.task.unit}, on "
        f"{result.images - result.held_back} images, and on {result.held_back} held back)",
        title_justify="left",
    )
    for column in ("multiply-adds", "time (95 %)", result.task.unit, "held back", "tried"):
        table.add_column(column, justify="right")
    table.add_column("size; method; prune after blocks; patch tokens left")
    for found in result.found:
        best = found.chosen
        table.add_row(
            "-" if best.multiply_adds is None else f"{best.multiply_adds:.4f}",
            "-"
            if best.timing is None
            else f"{best.timing.ratio:.2f} ({best.timing.interval[0]:.2f} to {best.timing.interval[1]:.2f})",
            f"{best.divergence:.4f}",
            "-" if best.held_back is None else f"{best.held_back:.4f}",
            str(len(found.trials)),
            _what(found),
        )
    return table


def _what(found: Found) -> str:
    size, settings = str(found.chosen.size), found.chosen.settings
    parts = ([size] if size else []) + (["int8"] if found.recipe.pruning.weights == "int8" else [])
    if settings.schedule.points:
        method = f"{settings.importance}/{settings.reduction}/{settings.alignment}"
        parts += [method, *(", ".join(map(str, each)) for each in (settings.schedule.points, settings.schedule.tokens))]
    return "; ".join(parts)
