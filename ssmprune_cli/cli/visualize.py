"""`ssmprune visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmprune_cli.cli import output


def command(
    path: Annotated[Path, typer.Argument(help="An artefact folder, as `ssmprune compress` wrote it.")],
    images: Annotated[Path, typer.Argument(help="Images: a folder, a tree of folders or an .npz.")],
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    count: Annotated[int, typer.Option(help="How many images to show.", min=1)] = 6,
    seed: Annotated[int, typer.Option(help="Seed of the choice of images.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Draw which patches a pruned model keeps: one row for each image, one column for each prune point.

    Dropped patches are faded to blue. Where patches overlap, a cell of the picture is the centre of its patch.
    """
    from ssmprune_cli import checkpoint
    from ssmprune_cli.data import calibration_images
    from ssmprune_cli.workflows.visualize import visualize

    found = visualize(checkpoint.load(path), calibration_images(images, count, seed), out)
    data = {"picture": str(out), "stages": [stage.to_dict() for stage in found]}
    lines = [f"After block {stage.block}: {stage.count} of {stage.patches} patches kept" for stage in found]
    output.emit("\n".join(lines), data, as_json=as_json)
    output.note(f"Written to {out}")
