"""`ssmprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.limits import Limits, MaxDrop, MaxFlops, MaxLatencyRatio, MinAccuracy, enforce
from ssmprune_cli.cli.options import BackendName, PeerTimeout, PrecisionName, reads_checkpoints
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.console import Group

    from ssmprune_cli.workflows.evaluate import Evaluation


@reads_checkpoints
def command(
    path: Annotated[Path, typer.Argument(help="A checkpoint file or an artefact folder.")],
    dataset: Annotated[str, typer.Option(help="Layout of the data: imagenet, imagefolder, cifar10, cifar100 or npz.")],
    data_dir: Annotated[Path, typer.Option(help="Where the images are; for npz, the file.")],
    compare: Annotated[
        Path | None, typer.Option(help="A second model, such as the dense one, judged on the same images.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use so many images, drawn at random from equal stretches of the dataset.")
    ] = None,
    max_drop: MaxDrop = None,
    min_accuracy: MinAccuracy = None,
    max_flops: MaxFlops = None,
    max_latency_ratio: MaxLatencyRatio = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 32,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    reading: Reading = NOTHING_SAID,
    precision: PrecisionName = "fp32",
    peer_timeout: PeerTimeout = 600,
    backend: BackendName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure accuracy on labelled images: top-1 and top-5 with 95 % intervals.

    With --compare, also the difference on the same images, its interval and a paired test. --precision and how a
    checkpoint is read hold for both files. Limits are checked after the result is printed; those on drop,
    multiply-adds and latency are against the --compare model.
    """
    limits = Limits(max_drop, min_accuracy, max_flops, max_latency_ratio)
    if compare is None:
        limits.require(("max_drop", "max_flops", "max_latency_ratio"), "--compare, the dense model")

    from ssmprune_cli import checkpoint
    from ssmprune_cli.data import open_dataset
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.workflows.evaluate import evaluate
    from ssmprune_cli.workflows.measure import count_flops, in_precision
    from ssmprune_cli.workflows.processes import join_processes

    use_backend(backend)
    device = join_processes(device, peer_timeout)
    images = open_dataset(dataset, data_dir)
    paths = [path] if compare is None else [path, compare]
    loaded = [checkpoint.load_as(each, reading) for each in paths]
    models = [in_precision(each, precision) for each in loaded]
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
    for note in result.notes:
        output.warn(note)
    flops = None
    if max_flops is not None:
        own, dense = (count_flops(model).all_directions for model in models)
        flops = own / dense
    comparison = result.comparison
    checks = limits.check(
        difference=comparison.difference if comparison else None,
        top1=result.accuracy.top1,
        flops=flops,
        latency_ratio=comparison.dense.images_per_second / result.accuracy.images_per_second if comparison else None,
    )
    data = {**result.to_dict(), "limits": [check.to_dict() for check in checks]}
    output.emit(_tables([each.name for each in paths], result), data, as_json=as_json)
    enforce(checks)


def _tables(names: list[str], result: Evaluation) -> Group:
    """Each model's accuracy in a column, and the paired difference below."""
    from rich.console import Group
    from rich.table import Table

    comparison = result.comparison
    models = [result.accuracy] if comparison is None else [result.accuracy, comparison.dense]
    table = Table(title=f"{result.count:,} images, {result.dtype}", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    table.add_row("top-1 (%)", *(f"{100 * one.top1:.2f}" for one in models))
    table.add_row("  95 % interval", *(_interval(one.interval, "{:.2f}") for one in models))
    table.add_row("top-5 (%)", *("-" if one.top5 is None else f"{100 * one.top5:.2f}" for one in models))
    table.add_row("images per second", *(f"{one.images_per_second:.1f}" for one in models))
    if comparison is None:
        return Group(table)
    return Group(
        table,
        f"Difference in top-1: {100 * comparison.difference:+.2f} percentage points "
        f"(95 % interval {_interval(comparison.difference_interval, '{:+.2f}')}; "
        f"exact McNemar test p = {comparison.p_value:.2g})",
    )


def _interval(ends: tuple[float, float], form: str) -> str:
    """An interval of fractions, in per cent."""
    return " to ".join(form.format(100 * end) for end in ends)
