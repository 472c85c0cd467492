"""`ssmprune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmprune_cli.cli import output, values
from ssmprune_cli.cli.help import DATA, OUTPUT
from ssmprune_cli.cli.options import AsJson, choice_option, reads_checkpoints
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.console import Group

    from ssmprune_cli.export import Exported


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
    check: Annotated[
        Path | None,
        typer.Option(
            help="Images to check the file with: a folder, one image or an .npz [default: random images].",
            rich_help_panel=DATA,
        ),
    ] = None,
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
) -> None:
    """Write a model, dense or compressed, as a file for other programs: ONNX or torch.export.

    The file is read back and run as its user will, one image and three at a time. It is kept only if every answer is
    the model's and no logit is further away than 1e-4 of the largest one. It holds the preprocessing, the names of the
    classes, the configuration, the schedule, the checksum of its source and the result of that check.
    """
    from ssmprune_cli.workflows.export import ExportRequest, run

    size = None if batch == "dynamic" else int(batch)
    request = ExportRequest(path, out, target, size, check, opset, reading)
    with output.progress("Exporting"):
        exported = run(request)
    output.emit(_shown(exported), exported.to_dict(), as_json=as_json)


def _shown(exported: Exported) -> Group:
    from rich.console import Group
    from rich.table import Table

    batch = "any number of images" if exported.batch is None else f"{exported.batch} images"
    lines = [
        f"{exported.path}: {exported.target}, {exported.size / 1e6:.1f} MB, for {batch} in a batch",
        f"Checked with {exported.images} images. Allowed: {exported.tolerance:g} of the largest logit.",
    ]
    table = Table()
    for title in ("runtime", "batch", "difference", "same answers, %"):
        table.add_column(title, justify="left" if title == "runtime" else "right")
    for check in exported.checks:
        table.add_row(check.runtime, str(check.batch), f"{check.error:.1e}", f"{100 * check.same:.2f}")
    return Group(*lines, table)
