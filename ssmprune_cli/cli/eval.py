"""`ssmprune eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssmprune_cli.cli import columns, formats, output, own_module
from ssmprune_cli.cli.help import DATA, DEVICE, INPUT
from ssmprune_cli.cli.limits import JudgeBy, MaxDrop, MaxFlops, MaxLatencyRatio, MinAccuracy, MinMiou
from ssmprune_cli.cli.options import (
    AsJson,
    BackendName,
    DeviceName,
    PeerTimeout,
    PrecisionName,
    Slide,
    dataset_option,
    pair,
    reads_checkpoints,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.files import distinct_names
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading

if TYPE_CHECKING:
    from rich.console import Group

    from ssmprune_cli.workflows.evaluate import Evaluation


@reads_checkpoints
def command(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(help="A checkpoint file, an artefact folder or an exported .onnx.")],
    dataset: Annotated[str, dataset_option("Layout of --data")],
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            "--data-dir",
            help="Images with labels, masks or boxes: a folder; for npz, the file.",
            rich_help_panel=DATA,
        ),
    ],
    compare: Annotated[
        Path | None,
        typer.Option(help="A second model, such as the dense one, judged on the same images.", rich_help_panel=INPUT),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1, help="Use so many images, drawn at random from equal stretches of the dataset.", rich_help_panel=DATA
        ),
    ] = None,
    slide: Slide = None,
    segments: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Videos: sample each clip so often, from other moments on, and judge the mean [default: 1; the "
            "authors of VideoMamba take 4].",
            rich_help_panel=DATA,
        ),
    ] = None,
    crops: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=64,
            help="Videos: look at so many squares along the long side of the frames [default: 1, the middle; the "
            "authors of VideoMamba take 3].",
            rich_help_panel=DATA,
        ),
    ] = None,
    save_predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Detection: write boxes and masks of PATH's model to FILE, in COCO's own format for results.",
            rich_help_panel=DATA,
        ),
    ] = None,
    max_drop: MaxDrop = None,
    min_accuracy: MinAccuracy = None,
    min_miou: MinMiou = None,
    max_flops: MaxFlops = None,
    max_latency_ratio: MaxLatencyRatio = None,
    judge: JudgeBy = "interval",
    form: formats.TableFormat = "table",
    as_json: AsJson = False,
    reading: Reading = NOTHING_SAID,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Images in a batch [default: 32; of a dense model 1].", rich_help_panel=DEVICE),
    ] = None,
    device: DeviceName = "cpu",
    precision: PrecisionName = "fp32",
    peer_timeout: PeerTimeout = 600,
    backend: BackendName = "auto",
    module: own_module.ModuleName = None,
) -> None:
    """Measure accuracy: top-1 and top-5 of classifiers, mIoU, aAcc and mAcc of segmenters, AP of boxes and masks of
    detectors, with 95 % intervals.

    With --compare, also the difference on the same images, its interval and a paired test. --precision and how a
    checkpoint is read hold for both files. Limits are checked after the result is printed; those on drop,
    multiply-adds and latency are against the --compare model. An exported file is run by ONNX Runtime, with our
    kernels where it can.

    With --module: top-1 and top-5 of a classifier of your own; of an output folder, beside the dense one.
    """
    from rich.console import Group

    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.tasks import TASKS, Estimate
    from ssmprune_cli.workflows.evaluate import Views, evaluate
    from ssmprune_cli.workflows.limits import Limits, enforce
    from ssmprune_cli.workflows.measure import count_flops
    from ssmprune_cli.workflows.processes import join_processes
    from ssmprune_cli.workflows.reporting import verdicts
    from ssmprune_cli.workflows.subject import definition_of, read
    from ssmprune_cli.workflows.write import check_place, write_text

    if module is not None:
        from ssmprune_cli.workflows.own_module import ModuleSource

        own_module.refuse_others(context, own_module.EVAL)
        use_backend(backend)
        source = ModuleSource(path, module, reading, device)
        result, names = own_module.evaluate(source, data, dataset, limit=limit, batch_size=batch_size)
        output.emit(_tables(names, result), result.to_dict(), as_json=as_json)
        return
    form = formats.chosen(form, as_json=as_json)
    limits = Limits(max_drop, min_accuracy, min_miou, max_flops, max_latency_ratio, judge)
    if compare is None:
        limits.require(("max_drop", "max_flops", "max_latency_ratio"), "--compare, the dense model")
    use_backend(backend)
    device = join_processes(device, peer_timeout)
    paths = [path] if compare is None else [path, compare]
    subjects = read(paths, reading, precision, device)
    models = [definition_of(each.model) for each in subjects]
    task = TASKS.get(models[0].task)
    limits.fit(task)
    if slide is not None:
        crop, stride = pair(slide)
        task = task.sliding((crop, crop), (stride, stride))
    if save_predictions is not None:
        if not task.saves:
            raise UsageError(f"is for detection, and the model is for {task.name}", where="--save-predictions")
        check_place(save_predictions, "--save-predictions")
    images = task.open(data, dataset, model=models[0])
    with output.progress("Evaluating") as advance:
        result = evaluate(
            subjects[0].model,
            images,
            batch_size=task.at_once(32, batch_size),
            limit=limit,
            compare=subjects[1].model if compare else None,
            task=task,
            views=None if segments is None and crops is None else Views(segments or 1, crops or 1),
            device=device,
            progress=advance,
        )
    for note in result.notes:
        output.warn(note)
    if save_predictions is not None and result.images is not None:
        write_text(save_predictions, task.predictions(result.results, result.images))
    flops = None
    if max_flops is not None:
        own, dense = (count_flops(model).all_directions for model in models)
        flops = own / dense
    ratio = None
    if result.dense_images_per_second is not None:
        ratio = Estimate(result.dense_images_per_second / result.images_per_second)
    checks = limits.check(
        result.task, score=result.score, comparison=result.comparison, flops=flops, latency_ratio=ratio
    )
    facts = {**result.to_dict(), "limits": [check.model_dump(mode="json") for check in checks]}
    names = formats.unique(distinct_names(paths))
    formats.emit(
        Group(_tables(names, result), *verdicts(checks)),
        lambda: columns.of_evaluation(names, models, result),
        facts,
        form,
    )
    enforce(checks)


def _tables(names: list[str], result: Evaluation) -> Group:
    """Each model's score in a column, and the paired difference below."""
    from rich.console import Group
    from rich.table import Table

    scores, speeds = [result.score], [result.images_per_second]
    if result.comparison is not None and result.dense_images_per_second is not None:
        scores.append(result.comparison.dense)
        speeds.append(result.dense_images_per_second)
    cases = result.task.cases
    views = "" if result.views is None else f", {result.views}"
    table = Table(title=f"{result.count:,} {cases}{views}, {result.dtype}", title_justify="left")
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row in (*result.task.table(scores), [f"{cases} per second", *(f"{speed:.1f}" for speed in speeds)]):
        table.add_row(*row)
    shown: list[Table | str] = [table]
    if lines := result.task.by_part(scores):
        parts = Table(title=f"By {result.task.parts[0]}, %", title_justify="left")
        parts.add_column("")
        for name in names:
            parts.add_column(name, justify="right", overflow="fold")
        for line in lines:
            parts.add_row(*line)
        shown.append(parts)
    return Group(*shown, *([] if result.comparison is None else [result.task.difference(result.comparison)]))
