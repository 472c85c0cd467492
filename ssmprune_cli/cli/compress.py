"""`ssmprune compress`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table

from ssmprune_cli.cli import output, own_module, values
from ssmprune_cli.cli.help import DATA, HOW_MUCH, METHOD, OUTPUT
from ssmprune_cli.cli.limits import JudgeBy, MaxDrop, MaxFlops, MaxLatencyRatio, MinAccuracy, MinMiou
from ssmprune_cli.cli.options import (
    MAX_SIDE,
    AsJson,
    BackendName,
    DataLimit,
    DeviceName,
    Evaluations,
    Int8,
    KeepBlocks,
    KeepImageSize,
    RepairKind,
    Slide,
    StateFile,
    TimedBatch,
    TimeLimit,
    choice_option,
    counts_option,
    data_option,
    dataset_option,
    importance_option,
    pair,
    ratios_option,
    reads_checkpoints,
    seed_option,
)
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading
from ssmprune_cli.report import Report


@reads_checkpoints
def command(
    context: typer.Context,
    ckpt: Annotated[Path, typer.Argument(help="The checkpoint, as its authors published it.")],
    keep: Annotated[
        str | None,
        ratios_option(
            "--keep",
            "Ratio of patch tokens kept *at each prune point*: one number for all points (0.6 at three points leaves "
            "0.6 x 0.6 x 0.6 of them at the end), or one a point: 0.9,0.8,0.7.",
        ),
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(
            parser=values.number(1, MAX_SIDE, whole=True),
            metavar="PIXELS",
            help="Side of smaller images for the model, position embeddings interpolated: alone, or with tokens "
            "dropped too.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    cut_blocks: Annotated[
        int | None,
        typer.Option(
            parser=values.number(1, whole=True),
            metavar="COUNT",
            help="Leave out so many of the last blocks (of the longest stage), the head refitted on --calib: alone, or "
            "with tokens dropped too.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        counts_option("--tokens", "Instead of --keep: patch tokens left after each point: 150,120,90.", "150,120"),
    ] = None,
    target_latency_ratio: Annotated[
        float | None,
        typer.Option(
            parser=values.number(above=0, high=1),
            metavar="RATIO",
            help="Instead of --keep: search for the best that takes this share of the dense model's time.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    target_speedup: Annotated[
        float | None,
        typer.Option(
            parser=values.number(above=1),
            metavar="TIMES",
            help="The same as how many times as fast: 1.4 is a share of 1/1.4.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    target_latency: Annotated[
        float | None,
        typer.Option(
            parser=values.number(above=0),
            metavar="MS",
            help="Search for the best that takes this many ms a batch on --device.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    target_flops: Annotated[
        float | None,
        typer.Option(
            parser=values.number(above=0, high=1),
            metavar="RATIO",
            help="Search for the best within this share of the dense multiply-adds.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    target_size: Annotated[
        int | None,
        typer.Option(
            parser=values.size,
            metavar="SIZE",
            help="Make the file of weights this small, 5MB: by weights in eight bits, then by fewer blocks. Also with "
            "--keep, --tokens or --resize.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    points: Annotated[
        str | None,
        counts_option(
            "--points",
            "Prune after how many blocks: 5,10,15. Default: a quarter, half, three quarters of the depth.",
            "5,10,15",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            parser=values.recipe,
            metavar="RECIPE",
            help="A recipe file or the name of a shipped one.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Overrides the recipe: --set pruning.keep=0.7. May be repeated.",
            rich_help_panel=HOW_MUCH,
        ),
    ] = None,
    importance: Annotated[str | None, importance_option("Score by which tokens stay [default: clip]")] = None,
    reduction: Annotated[
        str | None,
        choice_option(
            "--reduction",
            ("auto", *values.REDUCTIONS),
            "What becomes of the other tokens. auto, the default, compares a few at equal time on the --calib images. "
            "One of",
        ),
    ] = None,
    alignment: Annotated[
        str | None,
        choice_option(
            "--alignment",
            ("auto", *values.ALIGNMENTS),
            "How scans make up for dropped tokens. auto, the default, is mass for merged and pooled tokens, null for "
            "grid-merge, else calibrated with --calib and null without. One of",
        ),
    ] = None,
    repair: RepairKind = None,
    distill_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=100_000,
            metavar="N",
            help="After the repair, train all weights towards the dense model's answers to the --calib images, without "
            "labels: so many updates of 32 images. They are kept only if they are clearly better on images held back.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    seed: Annotated[int | None, seed_option("Seed of the random score and of the choice of images.")] = None,
    int8: Int8 = False,
    keep_image_size: KeepImageSize = False,
    keep_blocks: KeepBlocks = False,
    evaluations: Evaluations = 200,
    time_limit: TimeLimit = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled calibration images: a folder, a tree of folders, an .npz, or a .txt with their paths.",
            rich_help_panel=DATA,
        ),
    ] = None,
    calib_images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many to use [default: 1024, if there are so many; fewer to search, without a repair and of "
            "dense models].",
            rich_help_panel=DATA,
        ),
    ] = None,
    data: Annotated[
        Path | None, data_option("Images with labels or masks: accuracy before and after, on the same images.")
    ] = None,
    dataset: Annotated[str | None, dataset_option("Layout of --data")] = None,
    limit: DataLimit = None,
    samples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Put so many of the --data (or --calib) images into the artefact, for its report; 0: none.",
            rich_help_panel=DATA,
        ),
    ] = 4,
    slide: Slide = None,
    max_drop: MaxDrop = None,
    min_accuracy: MinAccuracy = None,
    min_miou: MinMiou = None,
    max_flops: MaxFlops = None,
    max_latency_ratio: MaxLatencyRatio = None,
    judge: JudgeBy = "interval",
    out: Annotated[Path | None, typer.Option(help="Folder to write the artefact to.", rich_help_panel=OUTPUT)] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing artefact.", rich_help_panel=OUTPUT)
    ] = False,
    state: StateFile = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print tokens per block and multiply-adds; read no images, write nothing.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    device: DeviceName = "cpu",
    batch_size: TimedBatch = None,
    backend: BackendName = "auto",
    module: own_module.ModuleName = None,
) -> None:
    """Make a checkpoint cheaper by dropping tokens between its blocks, and report what that costs and saves.

    Writes a folder with model.safetensors, config.json, recipe.yaml, report.html, report.json and a README.md. The
    input is never changed. --keep is the ratio kept at each point, the keep rate of the literature. With a target,
    points, token counts, score, reduction and alignment (those not given) are chosen by the divergence from the dense
    model on the --calib images; the report then says what was tried. With --max-drop, --data and nothing else, the
    fastest model is searched for that provably loses no more.

    With --module it is a module of your own, and tokens are dropped inside its mixers. That needs --calib and how
    images are prepared, and writes a folder for profile and eval with the same --module.
    """
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.workflows.compress import CompressRequest, compress_checkpoint
    from ssmprune_cli.workflows.limits import Limits, enforce
    from ssmprune_cli.workflows.source import Source

    use_backend(backend)
    if module is not None:
        own_module.refuse_others(context, own_module.COMPRESS)
    request = CompressRequest(
        source=Source(ckpt, reading),
        resize=resize,
        weights="int8" if int8 else None,
        keep=keep,
        tokens=tokens,
        target_latency_ratio=target_latency_ratio,
        target_speedup=target_speedup,
        target_latency=target_latency,
        target_flops=target_flops,
        target_size=target_size,
        batch_size=batch_size,
        cut_blocks=cut_blocks,
        keep_image_size=keep_image_size,
        keep_blocks=keep_blocks,
        evaluations=evaluations,
        time_limit=time_limit,
        state=state,
        points=points,
        importance=importance,
        reduction=reduction,
        alignment=alignment,
        repair=repair,
        distill_steps=distill_steps,
        calib=calib,
        calib_images=calib_images,
        recipe=recipe,
        overrides=tuple(overrides or ()),
        data=data,
        dataset=dataset,
        limit=limit,
        slide=None if slide is None else pair(slide),
        samples=samples,
        limits=Limits(max_drop, min_accuracy, min_miou, max_flops, max_latency_ratio, judge),
        out=out,
        overwrite=overwrite,
        device=device,
        seed=seed,
        dry_run=dry_run,
        command=shlex.join(["ssmprune", *sys.argv[1:]]),
    )
    if module is not None:
        own_module.compress(request, module, as_json=as_json)
        return
    with output.task_progress() as progress, output.kept_for_the_next_run(request.state_file):
        result = compress_checkpoint(request, progress)
    for warning in result.warnings:
        output.warn(warning)
    output.emit(_tables(result.report), result.report.to_dict(), as_json=as_json)
    if result.out is not None:
        output.note(f"Written to {result.out}")
    enforce(result.report.limits)


def _tables(report: Report) -> Group:
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.reporting import (
        block_by_block,
        distilled,
        eight_bits,
        repaired,
        smaller,
        verdict,
        verdicts,
    )

    dense, pruned, pruning = report.dense, report.pruned, report.pruning
    assert pruned is not None
    table = Table(title=f"{report.provenance['input']}: before and after", title_justify="left")
    for column in ("", "dense", report.called, "change"):
        table.add_column(column, justify="left" if not column else "right")
    costs = [
        ("multiply-adds, all directions (G)", dense.multiply_adds_all_directions, pruned.multiply_adds_all_directions),
        ("multiply-adds, one direction (G)", dense.multiply_adds_one_direction, pruned.multiply_adds_one_direction),
    ]
    if dense.multiply_adds_head:
        encoders = [each.multiply_adds_all_directions - each.multiply_adds_head for each in (dense, pruned)]
        costs.append(("  of the backbone, all directions (G)", encoders[0], encoders[1]))
        costs.append(("  of the head (G)", dense.multiply_adds_head, pruned.multiply_adds_head))
    for title, before, after in costs:
        table.add_row(title, f"{before / 1e9:.4f}", f"{after / 1e9:.4f}", f"{after / before - 1:+.1%}")
    table.add_row(
        "moved by gathers, sorts and sums (MB)",
        f"{dense.bytes_moved / 1e6:.2f}",
        f"{pruned.bytes_moved / 1e6:.2f}",
        f"{(pruned.bytes_moved - dense.bytes_moved) / 1e6:+.2f} MB",
    )
    if report.speed is not None:
        first, second = report.speed.dense, report.speed.pruned
        table.add_row(
            f"latency of a batch of {report.speed.batch_size} (ms)",
            f"{first.median_ms:.1f}",
            f"{second.median_ms:.1f}",
            f"{report.speed.latency_ratio - 1:+.1%}",
        )
    notes = []
    task = TASKS.get(report.task)
    compared = task.facts(report)
    if compared is not None:
        row = task.brief(compared)
        for each in (row, *task.briefs(compared)):
            table.add_row(each.title, each.dense, each.pruned, each.change)
        named = task.metric.capitalize() if task.metric.islower() else task.metric
        notes.append(f"{named} changes by {row.within} points (95 %).")
    lengths = Table(title="Tokens entering each block", title_justify="left")
    lengths.add_column("block")
    lengths.add_column("dense", justify="right")
    lengths.add_column(report.called, justify="right")
    tokens = block_by_block(report, pruned.tokens_per_block)
    for first_block, last in _runs(tokens):
        name = f"{first_block + 1}" if first_block == last else f"{first_block + 1} to {last + 1}"
        lengths.add_row(name, str(dense.tokens_per_block[first_block]), str(tokens[first_block] or "left out"))
    notes += [f"{text[0].upper()}{text[1:]}." for text in smaller(report)]
    if pruning is not None:
        kept = f"Keep ratio {pruning.keep} at each point" if pruning.keep else "Token counts as given"
        notes.append(
            f"{kept}, after {', '.join(map(str, pruning.points))} blocks; importance {pruning.importance}, "
            f"reduction {pruning.reduction}, alignment {pruning.alignment}."
        )
        if pruning.returning != "left":
            notes.append(f"A dropped token comes back by {pruning.returning!r}.")
    notes += eight_bits(report) + repaired(report) + distilled(report)
    notes += verdicts(report.limits)
    return Group(verdict(report), table, lengths, *notes)


def _runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """First and last index of each run of equal values."""
    starts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1]]
    return list(zip(starts, [start - 1 for start in starts[1:]] + [len(values) - 1], strict=True))
