"""`ssmprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.errors import LimitError, UsageError

if TYPE_CHECKING:
    from rich.console import Group


def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or an artefact folder.")],
    dataset: Annotated[str, typer.Option(help="Layout of the data: imagenet, imagefolder, cifar10 or npz.")],
    data_dir: Annotated[Path, typer.Option(help="Where the images are; for npz, the file.")],
    compare: Annotated[
        Path | None, typer.Option(help="A second model, such as the dense one, judged on the same images.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use so many images only.")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(min=0, help="With --compare: exit with 3 if top-1 is lower by more percentage points than this."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    family: Annotated[str | None, typer.Option(help="Model family, if it cannot be told from the file.")] = None,
    variant: Annotated[str | None, typer.Option(help="Published configuration, if it cannot be told.")] = None,
    weights: Annotated[str, typer.Option(help="Which copy in the file: model or model_ema.")] = "model",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy on labelled images: top-1 and top-5 with 95 % intervals.

    With --compare, also the difference on the same images, its interval and a paired test. --family, --variant and
    --weights hold for both files.
    """
    if max_drop is not None and compare is None:
        raise UsageError("--max-drop needs --compare, the model to measure the drop against")

    from ssmprune_cli import checkpoint
    from ssmprune_cli.data import open_dataset
    from ssmprune_cli.workflows.evaluate import evaluate

    images = open_dataset(dataset, data_dir)
    paths = [path] if compare is None else [path, compare]
    models = [checkpoint.load(each, family=family, variant=variant, weights=weights) for each in paths]
    with output.progress("Evaluating") as advance:
        result = evaluate(
            models[0],
            images,
            batch_size=batch_size,
            limit=limit,
            compare=models[1] if compare else None,
            device=device,
            progress=advance,
        )
    figures = result.to_dict()
    output.emit(_tables([each.name for each in paths], figures), figures, as_json=as_json)
    if max_drop is not None:
        drop = -100 * figures["difference"]
        if drop > max_drop:
            raise LimitError(f"top-1 fell by {drop:.2f} percentage points; --max-drop allows {max_drop:g}")


def _tables(names: list[str], figures: dict[str, Any]) -> Group:
    """Both models' accuracy in columns, and the paired difference below."""
    from rich.console import Group
    from rich.table import Table

    columns = [figures] + ([figures["dense"]] if figures.get("dense") else [])
    table = Table(title=f"{figures['count']:,} images", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for title, key in (("top-1 (%)", "top1"), ("top-5 (%)", "top5")):
        table.add_row(title, *(_percent(one, key) for one in columns))
    return Group(table)
