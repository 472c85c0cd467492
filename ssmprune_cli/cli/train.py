"""`ssmprune train`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssmprune_cli.cli import output
from ssmprune_cli.cli.options import BackendName

if TYPE_CHECKING:
    from ssmprune_cli.workflows.train import Epoch


def command(
    data_dir: Annotated[Path, typer.Option(help="Training images: a folder or an .npz; all are held in memory.")],
    out: Annotated[Path, typer.Option(help="Checkpoint file to write.")],
    family: Annotated[str, typer.Option(help="Model family.")] = "vim",
    name: Annotated[
        str, typer.Option(help="Name of the model, stored in the file; layouts with equal keys are told apart by it.")
    ] = "vim_midclstok_div2",
    config: Annotated[
        list[str] | None, typer.Option("--set", help="key=value of the family's configuration: --set depth=12")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start from the weights of this checkpoint, of the same configuration.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Layout of the images: npz, imagefolder or cifar10.")] = "imagefolder",
    val_dir: Annotated[Path | None, typer.Option(help="Images to measure the accuracy on after each epoch.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 10,
    batch_size: Annotated[int, typer.Option(help="Images in a step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate at its highest.")] = 1e-3,
    warmup: Annotated[float, typer.Option(help="Epochs until the learning rate is at its highest.")] = 1.0,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices and filters.")] = 0.05,
    label_smoothing: Annotated[float, typer.Option(help="Share of the target spread over all classes.")] = 0.1,
    shift: Annotated[int, typer.Option(help="Move images at random by up to so many pixels.")] = 0,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the images: not for digits or text.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the weights, the order of the images and augmentation.")] = 0,
    log: Annotated[Path | None, typer.Option(help="Log to write: JSON, a line for each epoch.")] = None,
    backend: BackendName = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a small model from scratch on images that fit in memory: AdamW, linear warm-up, cosine decay.

    The checkpoint is written at the end, and when Ctrl-C stops the training early. The same input and seed give the
    same weights on the same machine.
    """
    from ssmprune_cli.data import open_dataset
    from ssmprune_cli.kernels import use_backend
    from ssmprune_cli.workflows.new_model import build, start_from, write_checkpoint
    from ssmprune_cli.workflows.train import TrainSettings, json_line, labelled_images, provenance, train

    use_backend(backend)
    settings = TrainSettings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=lr,
        warmup_epochs=warmup,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        shift=shift,
        flip=flip,
        seed=seed,
    )
    model = build(family, config or [], name=name, seed=seed)
    if init is not None:
        start_from(model, init)
    images = labelled_images(open_dataset(dataset, data_dir, split="train"), model.preprocessing)
    validation = None if val_dir is None else labelled_images(open_dataset(dataset, val_dir), model.preprocessing)
    lines: list[str] = []

    def record(values: dict[str, Any]) -> None:
        lines.append(json_line(values))
        if log is not None:
            log.write_text("".join(lines), encoding="utf-8")

    def report(epoch: Epoch) -> None:
        record(asdict(epoch))
        top1 = "" if epoch.top1 is None else f", top-1 {100 * epoch.top1:.2f} %"
        output.note(f"epoch {epoch.epoch} of {epochs}: loss {epoch.loss:.4f}{top1}, {epoch.seconds:.1f} s")

    record(provenance(settings, shlex.join(["ssmprune", *sys.argv[1:]])))
    result = train(model, images, validation, settings, log=report)
    write_checkpoint(out, model, name=name, epoch=len(result.epochs))
    data = {"checkpoint": str(out), "interrupted": result.interrupted, "epochs": [asdict(e) for e in result.epochs]}
    last = result.epochs[-1:]
    top1 = "".join(f", top-1 {100 * epoch.top1:.2f} %" for epoch in last if epoch.top1 is not None)
    output.emit(f"{out}: {len(result.epochs)} of {epochs} epochs{top1}", data, as_json=as_json)
    if result.interrupted:
        raise typer.Exit(130)
