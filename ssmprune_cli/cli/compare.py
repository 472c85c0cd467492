"""`ssmprune compare`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ssmprune_cli.cli import columns, formats, output, values
from ssmprune_cli.cli.help import DATA, DEVICE, INPUT, METHOD, OUTPUT
from ssmprune_cli.cli.options import (
    AsJson,
    BackendName,
    DeviceName,
    choice_option,
    dataset_option,
    ratios_option,
    reads_checkpoints,
    seed_option,
    split,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.files import distinct_names
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.recipe import Recipe, load_recipe, shipped_recipes

if TYPE_CHECKING:
    from rich.table import Table

    from ssmprune_cli.pruning import Method
    from ssmprune_cli.workflows.compare import Row

TABLES = {"imagenet-vim": "vim"}  # name -> family


@reads_checkpoints
def command(
    data: Annotated[
        Path,
        typer.Option(help="Images to compare on; without labels or masks there is no accuracy.", rich_help_panel=DATA),
    ],
    ckpt: Annotated[Path | None, typer.Argument(help="The dense checkpoint (not with --table).")] = None,
    dense: Annotated[
        list[Path] | None,
        typer.Option(help="A further dense checkpoint for the same table; may be repeated.", rich_help_panel=INPUT),
    ] = None,
    table: Annotated[
        str | None,
        choice_option("--table", tuple(TABLES), "Every recipe with published numbers. Needs --checkpoints", INPUT),
    ] = None,
    checkpoints: Annotated[
        Path | None, typer.Option(help="Folder with the checkpoints of --table.", rich_help_panel=INPUT)
    ] = None,
    keep: Annotated[str | None, ratios_option("--keep", "Ratios kept at each default point: 0.8,0.6")] = None,
    flops: Annotated[
        str | None, ratios_option("--flops", "Equal cost: shares of the dense multiply-adds: 0.8,0.6")
    ] = None,
    times: Annotated[
        str | None, ratios_option("--times", "Equal time: shares of the dense model's, measured: 0.8,0.6")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            parser=values.methods,
            metavar="METHODS",
            help="importance/reduction/alignment, separated by commas; recipes by file or name too.",
            rich_help_panel=METHOD,
        ),
    ] = "random/drop/none,clip/drop/none,clip/context/none",
    seed: Annotated[int, seed_option("Seed of random scores and of the choice of images.")] = 0,
    dataset: Annotated[str | None, dataset_option("Layout of --data")] = None,
    limit: Annotated[
        int | None, typer.Option(min=2, help="Use so many images, always the same.", rich_help_panel=DATA)
    ] = None,
    calib: Annotated[
        Path | None, typer.Option(help="Unlabelled images for calibrated alignment.", rich_help_panel=DATA)
    ] = None,
    calib_images: Annotated[int, typer.Option(min=1, help="How many of them to use.", rich_help_panel=DATA)] = 64,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write plots to this .svg, and to one of the speed beside it.", rich_help_panel=OUTPUT),
    ] = None,
    form: formats.TableFormat = "table",
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images in a batch, timed ones included [default: 64; of a dense model 1].",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed turns of each model; the median is reported.", rich_help_panel=DEVICE)
    ] = 5,
    device: DeviceName = "cpu",
    backend: BackendName = "auto",
) -> None:
    """Compare ways to prune on the same images: multiply-adds, divergence, accuracy and speed, with intervals.

    Divergence is the mean KL(dense || pruned) of the class probabilities. Give --keep, --flops (equal cost) or --times
    (equal time on this device) for methods; recipes say themselves how much they prune. With them stands, for each
    budget, what a smaller image gives: the model resized to the largest side that costs no more (with --keep, no more
    than the dearest method).
    """
    if (table is None) == (ckpt is None):
        raise UsageError("give either a checkpoint or `--table imagenet-vim`")
    if table is not None and checkpoints is None:
        raise UsageError("--table needs --checkpoints, the folder with the published files")
    kinds: list[tuple[Literal["keep", "flops", "time"], str | None]] = [
        ("keep", keep),
        ("flops", flops),
        ("time", times),
    ]
    budgets = [(kind, value) for kind, text in kinds if text is not None for value in split(text)]

    from ssmprune_cli.data import open_dataset
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.compare import compare, published_table
    from ssmprune_cli.workflows.source import Source
    from ssmprune_cli.workflows.trials import Budget
    from ssmprune_cli.workflows.write import check_place

    form = formats.chosen(form, as_json=as_json)
    check_place(plot, "--plot")
    use_backend(backend)
    if ckpt is None:
        images = open_dataset(dataset or ("npz" if data.suffix == ".npz" else "imagenet"), data)
    else:
        model = Source(ckpt, reading).load()
        images = TASKS.get(model.task).open(data, dataset, model=model)
    run = partial(
        compare,
        calib=calib,
        calib_images=calib_images,
        limit=limit,
        batch_size=batch_size,
        rounds=rounds,
        device=device,
        seed=seed,
    )
    recipes: dict[str, Recipe] = {}
    rows: list[Row] = []
    notes: list[str] = []
    with output.task_progress() as progress:
        if table is not None and checkpoints is not None:
            shipped = [load_recipe(file) for file in shipped_recipes().values()]
            found, notes = published_table(shipped, checkpoints, TABLES[table])
            for file, own in found.items():
                source = Source(file, replace(reading, family=reading.family or TABLES[table]))
                result, more = run(source, images, [], [], recipes=own, progress=progress)
                rows += result
                notes += more
                recipes.update({recipe.name: recipe for recipe in own})
        elif ckpt is not None:
            names = methods.split(",")
            triples = [_method(name) for name in names if name.count("/") == 2 and not Path(name).exists()]
            files = [load_recipe(name) for name in names if name.count("/") != 2 or Path(name).exists()]
            if triples and not budgets:
                raise UsageError(
                    "how much to prune?", hint="Give `--keep 0.8,0.6`, `--flops 0.8,0.6` or `--times 0.8,0.6`."
                )
            names_of = formats.unique(distinct_names([ckpt, *(dense or [])]))
            first, *others = (
                Source(path, reading, name) for path, name in zip([ckpt, *(dense or [])], names_of, strict=True)
            )
            rows, notes = run(
                first,
                images,
                triples,
                [Budget(*budget) for budget in budgets],
                recipes=files,
                others=others,
                progress=progress,
            )
    for note in dict.fromkeys(notes):
        output.warn(note)
    if plot is not None:
        _plots(plot, rows)
        output.note(f"Plots written to {plot} and {_speed_plot(plot)}")
    named = zip(columns.labels(rows), rows, strict=True)
    formats.emit(
        _table(rows, recipes),
        lambda: columns.of_comparison(rows, TASKS.get(rows[0].task).key),
        {"rows": [{"model": label, **_data(row, recipes)} for label, row in named]},
        form,
    )


def _method(name: str) -> Method:
    """Raises UsageError that names the option."""
    from ssmprune_cli.pruning import Method

    try:
        return Method.parse(name)
    except UsageError as error:
        raise UsageError(error.what, where=f"--methods {name}", hint=error.hint) from error


def _data(row: Row, recipes: dict[str, Recipe]) -> dict[str, Any]:
    recipe = recipes.get(row.name)
    published = recipe.published.model_dump(mode="json") if recipe and recipe.published else None
    return {**row.to_dict(), "published": published}


def _table(rows: list[Row], recipes: dict[str, Recipe]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ssmprune_cli.tasks import TASKS

    title = "± is one standard error; other second lines are 95 % intervals"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model or method", overflow="fold")
    task = TASKS.get(rows[0].task)
    distance = task.unit.replace(" ", "\n")
    for column in ("multiply-\nadds", "images/s", distance, f"{task.metric} %", "change,\npoints"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        recipe = recipes.get(row.name)
        published = _published(recipe) if recipe else ""
        image = f"image {row.resized_from[0]} -> {row.image_size[0]} pixels" if row.resized_from else ""
        table.add_row(
            "\n".join(part for part in (row.name, image, f"at {row.budget}" if row.budget else "", published) if part),
            f"{row.share:.3f}",
            f"{row.images_per_second:.{0 if row.images_per_second >= 10 else 2}f}\n{row.speedup:.2f}x",
            "-" if row.divergence is None else f"{row.divergence:.4f}\n±{row.divergence_se:.4f}",
            _per_cent(row.metric, row.metric_interval, ""),
            _per_cent(row.difference, row.difference_interval, "+"),
        )
    return table


def _published(recipe: Recipe) -> str:
    numbers_of = recipe.published
    if numbers_of is None:
        return ""
    cost = "?" if numbers_of.multiply_adds is None else f"{numbers_of.multiply_adds:g}"
    return f"published: {numbers_of.top1:g} % at {cost} G ({numbers_of.training})"


def _per_cent(value: float | None, interval: tuple[float, float] | None, sign: str) -> str:
    if value is None or interval is None:
        return "-"
    low, high = interval
    return f"{100 * value:{sign}.2f}\n{100 * low:{sign}.1f} to {100 * high:{sign}.1f}"


def _plots(path: Path, rows: list[Row]) -> None:
    """The task's metric, or divergence without labels, against multiply-adds; in a second file, against speed."""
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.reporting import Series, write_plot

    judged = all(row.metric is not None for row in rows)
    names = list(dict.fromkeys(row.name for row in rows))

    def series(name: str, x: str) -> Series:
        own = sorted((row for row in rows if row.name == name), key=lambda row: float(getattr(row, x)))
        if judged:
            points = [(float(getattr(row, x)), 100 * (row.metric or 0.0)) for row in own]
            ends = [row.metric_interval or (0.0, 0.0) for row in own]
            return Series(name, points, [(100 * low, 100 * high) for low, high in ends])
        known = [(row, row.divergence, row.divergence_se or 0.0) for row in own if row.divergence is not None]
        points = [(float(getattr(row, x)), value) for row, value, _ in known]
        return Series(name, points, [(value - 1.96 * error, value + 1.96 * error) for _, value, error in known])

    task = TASKS.get(rows[0].task)
    y_label = f"{task.metric}, %" if judged else f"divergence, {task.unit}"
    for file, x, x_label in (
        (path, "share", "multiply-adds, share of dense"),
        (_speed_plot(path), "images_per_second", "images per second"),
    ):
        write_plot(file, [series(name, x) for name in names], title=rows[0].name, x_label=x_label, y_label=y_label)


def _speed_plot(path: Path) -> Path:
    return path.with_name(f"{path.stem}_speed{path.suffix}")
