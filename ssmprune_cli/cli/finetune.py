"""`ssmprune finetune`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ssmprune_cli.cli import output, values
from ssmprune_cli.cli.help import DATA, DEVICE, INPUT, OUTPUT, TRAINING
from ssmprune_cli.cli.options import (
    AsJson,
    BackendName,
    DeviceName,
    PeerTimeout,
    choice_option,
    dataset_option,
    reads_checkpoints,
    seed_option,
    training_option,
)
from ssmprune_cli.errors import UsageError
from ssmprune_cli.preprocessing import NOTHING_SAID, Reading


@reads_checkpoints
def command(
    data: Annotated[
        Path, typer.Option(help="Images with labels or masks to train on: a folder, or an .npz.", rich_help_panel=DATA)
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder to write: the models last and best, the log, the state to resume.", rich_help_panel=OUTPUT
        ),
    ],
    path: Annotated[Path | None, typer.Argument(help="Artefact folder or dense checkpoint.")] = None,
    distill: Annotated[
        Path | None, typer.Option(help="Dense checkpoint to distil from.", rich_help_panel=INPUT)
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Train a new dense model.", rich_help_panel=INPUT)
    ] = False,
    init: Annotated[
        Path | None,
        typer.Option(help="From scratch: start from the weights of this checkpoint.", rich_help_panel=INPUT),
    ] = None,
    reading: Reading = NOTHING_SAID,
    recipe: Annotated[
        str | None,
        typer.Option(
            parser=values.recipe,
            metavar="RECIPE",
            help="Recipe with a training section [default: the artefact's own].",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="training.key=value; from scratch also key=value of the model: --set depth=12. May be repeated.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    epochs: Annotated[int | None, training_option("--epochs", "N", "Passes over the training images.")] = None,
    batch_size: Annotated[
        int | None, training_option("--batch-size", "N", "Images in an update, over all processes.")
    ] = None,
    lr: Annotated[float | None, training_option("--lr", "RATE", "Learning rate at its highest.")] = None,
    warmup: Annotated[
        float | None,
        training_option(
            "--warmup", "EPOCHS", "Epochs until the learning rate is at its highest.", field="warmup_epochs"
        ),
    ] = None,
    weight_decay: Annotated[
        float | None, training_option("--weight-decay", "RATE", "Weight decay of matrices and filters.")
    ] = None,
    label_smoothing: Annotated[
        float | None, training_option("--label-smoothing", "SHARE", "Share of the target spread over all classes.")
    ] = None,
    shift: Annotated[
        int | None, training_option("--shift", "PIXELS", "Move images at random by up to so many pixels.")
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Mirror half of the images: not for digits or text.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: Annotated[int, seed_option("Seed of the order of the images, augmentation and new weights.")] = 0,
    dataset: Annotated[str | None, dataset_option("Layout of --data and --val-data")] = None,
    val_data: Annotated[
        Path | None,
        typer.Option(help="Images with labels or masks to judge the model on after each epoch.", rich_help_panel=DATA),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Train on so many images, drawn at random.", rich_help_panel=DATA)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the training in --out.", rich_help_panel=OUTPUT)
    ] = False,
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1, help="Save the state every so many updates, not only after epochs.", rich_help_panel=OUTPUT
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the log for TensorBoard.", rich_help_panel=OUTPUT)
    ] = False,
    pth: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="From scratch: write the last weights to this file too, in float16.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            help="From scratch: name in --checkpoint; layouts with equal keys are told apart by it.",
            rich_help_panel=OUTPUT,
        ),
    ] = "vim_midclstok_div2",
    as_json: AsJson = False,
    device: DeviceName = "cpu",
    precision: Annotated[str | None, choice_option("--precision", values.PRECISIONS, "Of activations", DEVICE)] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Processes that prepare images [default: 0 on a CPU, up to 8 on a GPU].",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    peer_timeout: PeerTimeout = 600,
    backend: BackendName = "auto",
) -> None:
    """Train a pruned model, tokens dropped as in use, to win back accuracy; or a dense one, or a new one.

    For several processes: `accelerate launch -m ssmprune_cli finetune ...` or `torchrun ... -m ssmprune_cli finetune`.
    Ctrl-C saves; --resume goes on. With the same settings and seed, a CPU gives the same weights.
    """
    if from_scratch == (path is not None):
        raise UsageError("give either an artefact or checkpoint, or `--from-scratch`")
    if not from_scratch and (init or pth):
        raise UsageError("`--init` and `--checkpoint` are for `--from-scratch`")
    read = replace(reading, family=None)
    if from_scratch and init is None and distill is None and read != Reading():
        names = [
            f"--{each.name.replace('_', '-')}" for each in fields(read) if getattr(read, each.name) != each.default
        ]
        raise UsageError(f"{', '.join(names)}: no checkpoint is read", hint="Set what a new model is by `--set`.")
    texts = settings or []
    of_model = [text for text in texts if not text.startswith("training.")]
    if of_model and not from_scratch:
        raise UsageError(f"`--set {of_model[0]}`: only training.key=value can be set", where="--set")
    given: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "warmup_epochs": warmup,
        "weight_decay": weight_decay,
        "label_smoothing": label_smoothing,
        "shift": shift,
        "flip": flip,
        "precision": precision,
    }

    from ssmprune_cli import checkpoint
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.tasks import TASKS
    from ssmprune_cli.workflows.finetune import (
        Data,
        build,
        check_container,
        check_trained,
        finetune,
        plan,
        some,
        start_from,
        write_checkpoint,
    )
    from ssmprune_cli.workflows.processes import join_processes, this_process
    from ssmprune_cli.workflows.write import check_folder, check_place

    check_folder(out, "--resume", allowed=resume)
    check_place(pth, "--checkpoint")
    use_backend(backend)
    if path is None:
        model = build(reading.family or "vim", of_model, name=name, seed=seed)
        if init is not None:
            start_from(model, init, reading)
    else:
        model = checkpoint.load_as(path, reading)
    check_trained(model)
    if pth is not None:
        check_container(model, name)
    job = plan(
        path,
        recipe=recipe,
        options={key: value for key, value in given.items() if value is not None},
        assignments=[text for text in texts if text.startswith("training.")],
        seed=seed,
        command=shlex.join(["ssmprune", *sys.argv[1:]]),
        device=join_processes(device, peer_timeout),
        teacher=None if distill is None else checkpoint.load_as(distill, replace(reading, family=model.family)),
        save_every=save_every,
        tensorboard=tensorboard,
        workers=workers,
    )
    task = TASKS.get(model.task)
    images = Data(
        some(task.open(data, dataset, split="train"), limit, seed),
        None if val_data is None else task.open(val_data, dataset),
    )

    notes = [note for each in (images.training, images.validation) if each is not None for note in each.notes]
    for note in dict.fromkeys(notes):
        output.warn(note)

    def metric(line: dict[str, Any]) -> str:
        value = line[task.key]
        return "" if value is None else f", {task.metric} {100 * value:.2f} %"

    def report(line: dict[str, Any]) -> None:
        if task.key in line:
            loss = "no update" if line["loss"] is None else f"loss {line['loss']:.4f}"
            output.note(
                f"epoch {line['epoch']} of {job.settings.epochs}: {loss}{metric(line)}, {line['seconds']:.1f} s"
            )
        elif "loss" in line and line["loss"] is None:
            output.warn(f"epoch {line['epoch']}, step {line['step']}: not finite, so this update was skipped")

    with output.progress("Training") as advance:
        result = finetune(model, images, job, out, resume=resume, report=report, progress=advance)
    if pth is not None and result.last is not None and this_process().rank == 0:
        write_checkpoint(pth, checkpoint.load(result.last), name=name, epoch=len(result.epochs))
    last = result.epochs[-1:]
    models = " and ".join(str(each) for each in (result.last, result.best) if each is not None)
    output.emit(
        f"{models or out}: {len(result.epochs)} of {job.settings.epochs} epochs{''.join(map(metric, last))}",
        result.to_dict(),
        as_json=as_json,
    )
    if result.interrupted:
        output.note(f"The state is saved. To go on: the same command with --resume (it is in {out}).")
        raise typer.Exit(128 + result.interrupted)
