"""`ssmprune profile`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group
from rich.table import Table

from ssmprune_cli.cli import columns, formats, output, own_module, values
from ssmprune_cli.cli.help import DEVICE, INPUT, OUTPUT
from ssmprune_cli.cli.options import (
    MAX_LENGTH,
    MAX_SIDE,
    AsJson,
    BackendName,
    DeviceName,
    PrecisionName,
    TimedBatch,
    reads_checkpoints,
    split,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.files import distinct_names
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.workflows.profile import Figures, Profile


@reads_checkpoints
def command(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A checkpoint file, an artefact folder or an exported .onnx.")],
    compare: Annotated[
        Path | None, typer.Option(help="A second model, timed side by side.", rich_help_panel=INPUT)
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            parser=values.lengths("1k,4k,16k", MAX_LENGTH),
            metavar="TOKENS",
            help="Text: time, memory and multiply-adds of windows of these lengths, and how they grow; 4k is 4096.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    image_sizes: Annotated[
        str | None,
        typer.Option(
            parser=values.lengths("224,512", MAX_SIDE),
            metavar="PIXELS",
            help="Images: the same for square images of these sides.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="With --lengths or --image-sizes: write a plot of them to this .svg.", rich_help_panel=OUTPUT
        ),
    ] = None,
    form: formats.TableFormat = "table",
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    batch_size: TimedBatch = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Timed rounds; the median is reported.", rich_help_panel=DEVICE)
    ] = 10,
    device: DeviceName = "cpu",
    precision: PrecisionName = "fp32",
    backend: BackendName = "auto",
    module: own_module.ModuleName = None,
) -> None:
    """Count parameters and multiply-adds, and measure latency, where the time goes, throughput and peak memory.

    Multiply-adds are for one image, clip or window of text; one multiply-add counts as one. "All directions" counts
    every scan; "one direction" counts the scans of a layer once, as the Vim papers do. Timed runs of the two models
    alternate. The floor is the least time: every matrix product and scan run alone or fused, or their bytes copied,
    whichever takes longer.

    An exported file is run by ONNX Runtime, with our kernels where it can. What happens inside is not seen: where its
    time goes, its floor and its memory are left out. Counts are those of the model that it says it holds.

    With --lengths or --image-sizes only a table of these sizes is made, of an output folder beside its dense model; a
    batch is then 1 by default. --plot draws it, with the fitted slopes.

    With --module: time and memory of a module of your own, by its own code, by our ops and, of an output folder, with
    tokens dropped.
    """
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.models import Backbone
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.profile import Profile, figures
    from ssmprune_cli.workflows.subject import definition_of, read
    from ssmprune_cli.workflows.write import check_place

    if module is not None:
        from ssmprune_cli.workflows.own_module import ModuleSource

        own_module.refuse_others(context, own_module.PROFILE)
        use_backend(backend)
        source = ModuleSource(path, module, reading, device)
        own_module.profile(source, batch_size=batch_size, rounds=rounds, as_json=as_json)
        return
    form = formats.chosen(form, as_json=as_json)
    if lengths is not None and image_sizes is not None:
        raise UsageError("--lengths is for text and --image-sizes for images: give one of them")
    asked = lengths or image_sizes
    check_place(plot, "--plot")
    if plot is not None and asked is None:
        raise UsageError("draws --lengths or --image-sizes: give one of them", where="--plot")
    use_backend(backend)
    paths = [path] if compare is None else [path, compare]
    subjects = read(paths, reading, precision, device)
    models = [each.model for each in subjects]
    if asked is not None:
        backbones = [each for each in models if isinstance(each, Backbone)]
        if len(backbones) < len(models):
            raise UsageError(
                "an exported file takes inputs of one size",
                where="--lengths" if lengths else "--image-sizes",
                hint="Give the output folder that it was exported from.",
            )
        dense = []
        if compare is None and backbones[0].pruner is not None:  # both sides of an output folder
            from ssmprune_cli.checkpoint import load_as
            from ssmprune_cli.workflows.measure import in_precision

            dense = [in_precision(load_as(path, reading, dense=True), precision)]
        _scaling(
            [*distinct_names(paths), *("dense" for _ in dense)],
            [*backbones, *dense],
            [int(size) for size in split(asked)],
            unit="pixels" if lengths is None else "tokens",
            batch_size=batch_size or 1,
            rounds=rounds,
            device=device,
            form=form,
            plot=plot,
        )
        return
    with output.progress("Timing") as advance:
        profiles = figures(models, batch_size=batch_size, device=device, rounds=rounds, progress=advance)
    tasks = [TASKS.get(definition_of(model).task) for model in models]
    for remark in dict.fromkeys(each for task in tasks for each in task.remarks):
        output.warn(remark)
    names = formats.unique(distinct_names(paths))
    opened = [
        (each.file_bytes, each.read_in_seconds + one.prepared_in_seconds)
        for each, one in zip(subjects, profiles, strict=True)
    ]
    data = {
        "models": [
            {"path": str(path), "file_bytes": size, "opens_in_seconds": seconds, **one.to_dict()}
            for path, (size, seconds), one in zip(paths, opened, profiles, strict=True)
        ]
    }
    seen = {name: one for name, one in zip(names, profiles, strict=True) if isinstance(one, Profile)}
    formats.emit(
        Group(
            _summary(names, profiles, opened, tasks[0].cases),
            *([_time(seen)] if seen else []),
            *_floors(seen),
            *_sessions(names, profiles),
            _blocks(names, profiles),
        ),
        lambda: columns.of_profiles(names, profiles),
        data,
        form,
    )


def _scaling(
    names: list[str],
    models: list[Backbone],
    sizes: list[int],
    *,
    unit: str,
    batch_size: int,
    rounds: int,
    device: str,
    form: str,
    plot: Path | None,
) -> None:
    from ssmprune_cli.workflows.reporting import length_plot
    from ssmprune_cli.workflows.scaling import scaling
    from ssmprune_cli.workflows.write import write_text

    named = dict(zip(formats.unique(names), models, strict=True))
    with output.progress("Timing") as advance:
        found = scaling(named, sizes, unit=unit, batch_size=batch_size, device=device, rounds=rounds, progress=advance)
    done = [point.rounds for point in next(iter(found.points.values()))]
    fewer = [f"{count} at {size:,}" for size, count in zip(sizes, done, strict=True) if count < rounds]
    if fewer:
        output.warn(f"Fewer than {rounds} rounds, which would take long: {', '.join(fewer)}.")
    if plot is not None:
        write_text(plot, length_plot(found))
        output.note(f"Plot written to {plot}")
    table = Table(
        title=f"By {'length' if unit == 'tokens' else 'image size'}: batch {found.batch_size}, {found.dtype}, "
        f"{found.device}, {found.threads} threads",
        title_justify="left",
    )
    table.add_column(unit, justify="right")
    titles = [*([] if unit == "tokens" else ["tokens"]), "ms", "G multiply-adds", "MiB"]
    for name in found.points:
        for title in titles:
            table.add_column(f"{title}, {name}", justify="right", overflow="fold")
    for number, size in enumerate(found.sizes):
        cells = [f"{size:,}"]
        for points in found.points.values():
            point = points[number]
            cells += [] if unit == "tokens" else [f"{point.tokens:,}"]
            cells += [f"{point.median_ms:.1f}", f"{point.multiply_adds / 1e9:.3f}"]
            cells.append(f"{point.peak_memory_bytes / 2**20:.1f}")
        table.add_row(*cells)
    lines = [
        f"{name}: time grows as tokens^{slope.exponent:.2f}, memory by {slope.bytes_per_token / 1024:.2f} KiB a token."
        for name, slope in found.slopes.items()
    ]
    formats.emit(Group(table, *lines), lambda: columns.of_scaling(found), found.to_dict(), form)


def _summary(names: list[str], profiles: list[Figures], opened: list[tuple[int, float]], cases: str) -> Group:
    """`cases` are what the models take."""
    from ssmprune_cli.workflows.profile import Profile

    first = profiles[0]
    refused = "".join(
        f"; not {name}: {reason}"
        for name, reason in first.backends_refused.items()
        if not reason.startswith("does not compute on")  # nobody expects a GPU's backend on a CPU
    )
    sizes = dict.fromkeys(p.inputs for p in profiles)
    heading = (
        f"{' and '.join(sizes)}, batch {first.batch_size}, {first.dtype}, {first.device}, "
        f"{first.threads} threads, kernels: {first.backend}{refused}"
    )
    table = Table()
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    if len(profiles) == 2:
        table.add_column("ratio", justify="right")

    def add(title: str, values: list[float], form: str) -> None:
        ratio = [f"{values[0] / values[1]:.3f}" if values[1] else "-"] if len(values) == 2 else []
        table.add_row(title, *(form.format(value) for value in values), *ratio)

    add("parameters", [p.parameters for p in profiles], "{:,}")
    add("multiply-adds, all directions (G)", [p.multiply_adds_all_directions / 1e9 for p in profiles], "{:.4f}")
    add("multiply-adds, one direction (G)", [p.multiply_adds_one_direction / 1e9 for p in profiles], "{:.4f}")
    if any(p.multiply_adds_head for p in profiles):
        encoders = [(p.multiply_adds_all_directions - p.multiply_adds_head) / 1e9 for p in profiles]
        add("  of the backbone, all directions", encoders, "{:.4f}")
        add("  of the head, which is not pruned", [p.multiply_adds_head / 1e9 for p in profiles], "{:.4f}")
    add("moved by gathers, sorts and sums (MB)", [p.bytes_moved / 1e6 for p in profiles], "{:.2f}")
    add("latency of a batch (ms), median", [p.speed.median_ms for p in profiles], "{:.1f}")
    spread = [f"{p.speed.quartiles_ms[0]:.1f} to {p.speed.quartiles_ms[1]:.1f}" for p in profiles]
    table.add_row("  quartiles", *spread, *([""] if len(profiles) == 2 else []))
    add(f"{cases} per second", [p.speed.images_per_second for p in profiles], "{:.1f}")
    seen = [p for p in profiles if isinstance(p, Profile)]
    if len(seen) == len(profiles):
        add("peak memory (MiB)", [p.peak_memory_bytes / 2**20 for p in seen], "{:.1f}")
    else:  # of checkpoints, both are of little interest
        add("file (MB)", [size / 1e6 for size, _ in opened], "{:.1f}")
        add("opens in (s)", [seconds for _, seconds in opened], "{:.2f}")
    return Group(heading, table)


def _time(seen: Mapping[str, Profile]) -> Table:
    table = Table(title="Where the time goes, ms of a batch", title_justify="left")
    table.add_column("")
    for name in seen:
        table.add_column(name, justify="right", overflow="fold")
        table.add_column("%", justify="right")
    for part in next(iter(seen.values())).time_ms:
        cells = []
        for p in seen.values():
            cells += [f"{p.time_ms[part]:.2f}", f"{100 * p.time_ms[part] / p.speed.median_ms:.0f}"]
        table.add_row(part, *cells)
    return table


def _floors(seen: Mapping[str, Profile]) -> list[str]:
    """Measured time against the roofline."""
    return [
        f"{name}: {p.speed.median_ms:.1f} ms a batch; the floor here is {p.floor.total_ms:.1f} ms "
        f"(multiply-adds {p.floor.multiply_adds_ms:.1f}, bytes {p.floor.bytes_ms:.1f}): "
        f"{100 * p.floor.total_ms / p.speed.median_ms:.0f} % of what this machine can do."
        for name, p in seen.items()
    ]


def _sessions(names: list[str], profiles: list[Figures]) -> list[str]:
    """How each model was run."""
    return [f"{name}, {p.session}" for name, p in zip(names, profiles, strict=True)]


def _blocks(names: list[str], profiles: list[Figures]) -> Table:
    table = Table(title="Tokens into each block, and its multiply-adds (M)", title_justify="left")
    table.add_column("block", justify="right")
    for name in names:
        table.add_column(f"tokens, {name}", justify="right", overflow="fold")
        table.add_column("M", justify="right")
    for block in range(max(len(p.tokens_per_block) for p in profiles)):
        cells = []
        for p in profiles:
            inside = block < len(p.tokens_per_block)
            cells.append(str(p.tokens_per_block[block]) if inside else "")
            cells.append(f"{p.multiply_adds_per_block[block] / 1e6:.1f}" if inside else "")
        table.add_row(str(block + 1), *cells)
    return table
