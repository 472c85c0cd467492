"""`ssmprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ssmprune_cli.cli import output, values
from ssmprune_cli.cli.help import DATA, OUTPUT
from ssmprune_cli.cli.limits import JudgeBy, MaxDrop
from ssmprune_cli.cli.options import AsJson, DataLimit, choice_option, data_option, dataset_option, reads_checkpoints
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.console import Group

    from ssmprune_cli.workflows.export import ExportResult
    from ssmprune_cli.workflows.int8 import Int8Facts


@reads_checkpoints
def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or an artefact folder.")],
    out: Annotated[
        Path,
        typer.Option(
            help="The file to write, or a folder, in which it is called model.onnx or model.pt2.",
            rich_help_panel=OUTPUT,
        ),
    ],
    target: Annotated[
        str,
        choice_option(
            "--format",
            values.TARGETS,
            "onnx (our ops are nodes with functions of standard operators), onnx-plain (standard operators only, for "
            "OpenVINO and others) or pt2 (torch.export, read with torch alone)",
            OUTPUT,
        ),
    ] = "onnx",
    batch: Annotated[
        str,
        typer.Option(
            parser=values.number_or("dynamic", 1, 4096),
            metavar="N",
            help="Images in a batch, or dynamic: any number.",
            rich_help_panel=OUTPUT,
        ),
    ] = "dynamic",
    opset: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of ONNX's operators [default: 18, which most runtimes read].", rich_help_panel=OUTPUT
        ),
    ] = None,
    int8: Annotated[
        Literal["static", "dynamic"] | None,
        choice_option(
            "--int8",
            ("static", "dynamic"),
            "Large products in 8-bit integers, with scales of activations from --calib (static) or from each batch "
            "(dynamic). ONNX only. What it costs and saves is told. One of",
            OUTPUT,
        ),
    ] = None,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Images to check the file with: a folder, one image or an .npz [default: random images].",
            rich_help_panel=DATA,
        ),
    ] = None,
    calib: Annotated[
        Path | None,
        typer.Option(
            help="Unlabelled images for --int8 static, of which 64 are used: a folder, one image or an .npz.",
            rich_help_panel=DATA,
        ),
    ] = None,
    data: Annotated[
        Path | None, data_option("Images with labels: accuracy in float32 and in int8, on the same images.")
    ] = None,
    dataset: Annotated[str | None, dataset_option("Layout of --data")] = None,
    limit: DataLimit = None,
    max_drop: MaxDrop = None,
    judge: JudgeBy = "interval",
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
) -> None:
    """Write a model, dense or compressed, as a file for other programs: ONNX or torch.export.

    The file is read back and run as its user will, one image and three at a time. It is kept only if every answer is
    the model's and no logit is further away than 1e-4 of the largest one. It holds the preprocessing, the names of the
    classes, the configuration, the schedule, the checksum of its source and the result of that check.

    With --int8 that is checked of the same file in float, which is not kept. The one in integers is compared with it:
    in answers, size and time, and with --data in accuracy. If it breaks --max-drop it is not kept either.
    """
    from ssmprune_cli.workflows.export import ExportRequest, run
    from ssmprune_cli.workflows.limits import Limits, enforce

    size = None if batch == "dynamic" else int(batch)
    limits = Limits(max_drop, judge=judge)
    request = ExportRequest(path, out, target, size, check, opset, reading, int8, calib, data, dataset, limit, limits)
    with output.progress("Exporting"):
        result = run(request)
    for remark in result.remarks:
        output.warn(remark)
    if result.int8 is not None and result.int8.accuracy is None:
        output.warn("What int8 costs in accuracy was not measured: give --data and --dataset.")
    if result.int8 is not None and any(each.speedup < 1 for each in result.int8.times):
        output.warn("In int8 the file is slower here than in float32.")
    output.emit(_shown(result), result.to_dict(), as_json=as_json)
    enforce(result.verdicts)


def _shown(result: ExportResult) -> Group:
    from rich.console import Group
    from rich.table import Table

    from ssmprune_cli.workflows.reporting import verdicts

    exported = result.exported
    batch = "any number of images" if exported.batch is None else f"{exported.batch} images"
    lines = [
        f"{exported.path}: {exported.target}, {exported.size / 1e6:.1f} MB, for {batch} in a batch",
        f"Checked with {exported.images} images. Allowed: {exported.tolerance:g} of the largest logit."
        if exported.tolerance is not None
        else f"In float32 it was checked with {exported.images} images. Its answers in int8 beside the model's:",
    ]
    table = Table()
    for title in ("runtime", "batch", "difference", "same answers, %"):
        table.add_column(title, justify="left" if title == "runtime" else "right")
    for check in exported.checks:
        table.add_row(
            check.runtime,
            str(check.batch),
            f"{check.error:.1e}",
            "" if check.same is None else f"{100 * check.same:.2f}",
        )
    if result.int8 is None:
        return Group(*lines, table)
    kept = [] if result.kept else [f"A limit is broken: {exported.path} was not kept."]
    return Group(*lines, table, _cost(result.int8), *verdicts(result.verdicts), *kept)


def _cost(facts: Int8Facts) -> Group:
    """What int8 costs and saves."""
    from rich.console import Group
    from rich.table import Table

    table = Table(title=f"int8, {facts.how}: {facts.products} large products", title_justify="left")
    for title in ("", "float32", "int8", "change"):
        table.add_column(title, justify="right" if title else "left")
    ratio = facts.float32_bytes / facts.int8_bytes
    table.add_row(
        "file, MB", f"{facts.float32_bytes / 1e6:.1f}", f"{facts.int8_bytes / 1e6:.1f}", f"{ratio:.2f} times smaller"
    )
    for each in facts.times:
        before, after = f"{each.float32_ms:.1f}", f"{each.int8_ms:.1f}"
        table.add_row(f"batch of {each.batch}, ms", before, after, f"{each.speedup:.2f} times as fast")
    judged = facts.accuracy
    if judged is not None and judged.comparison is not None:
        for row in judged.task.table([judged.comparison.dense, judged.score]):
            table.add_row(*row, "")
    lines = [f"Same answers in both: {100 * facts.same:.1f} % on {facts.images} images ({facts.shown})."]
    if judged is not None and judged.comparison is not None:
        lines.append(judged.task.difference(judged.comparison))
    return Group(table, *lines)
