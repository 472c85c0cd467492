"""`ssmprune visualize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.help import DATA, OUTPUT
from ssmprune_cli.cli.options import AsJson, reads_checkpoints, seed_option
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@reads_checkpoints
def command(
    path: Annotated[Path, typer.Argument(help="An artefact folder, as `ssmprune compress` wrote it.")],
    images: Annotated[list[Path], typer.Argument(help="Images: files, folders, trees of folders or .npz archives.")],
    out: Annotated[Path, typer.Option(help="Folder to write the pictures to.", rich_help_panel=OUTPUT)],
    count: Annotated[
        int, typer.Option(min=1, help="How many images to show of each folder or archive.", rich_help_panel=DATA)
    ] = 6,
    seed: Annotated[int, seed_option("Seed of the choice of images.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the pictures of an earlier run.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
) -> None:
    """Draw which patches a pruned model keeps, how it scores them, and what a segmenter makes of it.

    overview.png has a row for each image and a column for each prune point; of a segmenter it has the masks of the
    dense and the pruned model, and in red where they differ. Each image and point also has a picture of
    the kept patches and a heat map of the score (dark is low, bright is high), in the image's own aspect ratio. Kept
    patches are as they are. Dropped ones are grey and hatched; what the model's crop leaves out is plain grey. Where
    patches overlap, a cell of the picture is the centre of its patch.
    """
    from ssmprune_cli.workflows.write import check_folder

    check_folder(out, "--overwrite", allowed=overwrite)

    from ssmprune_cli import checkpoint
    from ssmprune_cli.data import Joined, some_images
    from ssmprune_cli.workflows.visualize import check_shown, visualize

    model = checkpoint.load_as(path, reading)
    check_shown(model)
    dataset = Joined([some_images(each, count, seed) for each in images])
    for note in dataset.notes:
        output.warn(note)
    drawn = visualize(model, dataset, out)
    lines = [f"After block {stage.block}: {stage.count} of {stage.patches} patches kept" for stage in drawn.stages]
    output.emit("\n".join([*lines, *drawn.words]), drawn.to_dict(), as_json=as_json)
    output.note(f"Written to {out}")
