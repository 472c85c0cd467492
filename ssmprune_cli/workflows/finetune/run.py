"""Fine-tune a model into a folder: the log, the state to resume from, and the models `last` and `best`."""

from __future__ import annotations

import json
import platform
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import accelerate
import torch

import ssmprune_cli
from ssmprune_cli import checkpoint
from ssmprune_cli.data import ImageDataset
from ssmprune_cli.errors import MAX_MESSAGE, UsageError, shown
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import TokenPruner, fold_head
from ssmprune_cli.recipe import Training
from ssmprune_cli.report import EpochFacts, FinetuningFacts, Report
from ssmprune_cli.tasks import TASKS
from ssmprune_cli.workflows.evaluate import evaluate
from ssmprune_cli.workflows.finetune.lessons import LESSONS
from ssmprune_cli.workflows.finetune.loop import Stopped, Trainer
from ssmprune_cli.workflows.finetune.loss import teach
from ssmprune_cli.workflows.finetune.state import BEST, LAST, Log, prepare_folder, read_state, write_state
from ssmprune_cli.workflows.identity import dataset_identity, model_identity
from ssmprune_cli.workflows.measure import machine, resolve_device
from ssmprune_cli.workflows.processes import as_first_process, gathered, this_process, together
from ssmprune_cli.workflows.reporting import describe, report_files


@dataclass(frozen=True)
class Data:
    """Images to train on, and those to judge the model on after every epoch, if any."""

    training: ImageDataset
    validation: ImageDataset | None = None


@dataclass(frozen=True)
class Job:
    """What is trained how, and what is written beside the weights.

    command   for the log
    teacher   the dense model to distil from
    files     what goes into the artefact folders beside the weights (recipe.yaml), by name
    report    of the artefact that is trained, if it has one; what this training did is added under "finetuning"
    save_every   updates between two states; None is once an epoch
    tensorboard  whether to write the log for TensorBoard too
    workers   processes that prepare images; None: none on a CPU, up to 8 on a GPU
    """

    settings: Training
    seed: int = 0
    command: str = ""
    device: str = "cpu"
    teacher: Backbone | None = None
    files: dict[str, str] = field(default_factory=dict)
    report: Report | None = None
    save_every: int | None = None
    tensorboard: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class Finetuned:
    """What was done: a line for each epoch, updates skipped, the signal that stopped it, and where the models are.

    interrupted  0 if the training came to its end, else the number of the signal: SIGINT or SIGTERM
    """

    epochs: list[dict[str, Any]]
    skipped: int
    interrupted: int
    last: Path | None
    best: Path | None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "last": self.last and str(self.last), "best": self.best and str(self.best)}


def check_trained(model: Backbone) -> None:
    """UsageError for a model of a task that is not trained here."""
    if model.task not in LESSONS:
        raise UsageError(
            f"a model for {model.task} cannot be fine-tuned: trained are those for {' and '.join(LESSONS.names())}",
            hint="`ssmprune compress` takes it as it is.",
        )


def finetune(
    model: Backbone,
    data: Data,
    job: Job,
    out: Path,
    *,
    resume: bool = False,
    report: Callable[[dict[str, Any]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Finetuned:
    """Train `model` in place, and write `out`: log.jsonl, state.pt, and the artefact folders `last` and `best`.

    resume    go on from the state in `out`, which the same settings must have made; on a CPU bit for bit
    report    called with every line of the log
    progress  called with (updates done, updates in all)

    Ctrl-C or SIGTERM saves after the update at hand, and the result says `interrupted`. Raises SsmpruneError for a
    folder without room, data that do not fit, and a training that diverges.
    """
    check_trained(model)
    settings, key = job.settings, TASKS.get(model.task).key
    resolve_device(job.device)  # raises now: without the device, Accelerate would take a CPU and say nothing
    for images in (data.training, data.validation):
        if images is not None:
            LESSONS.get(model.task).check(model, images, settings)
    fold_head(model)  # a repaired head is trained like the rest
    job = replace(job, report=_as_trained(job.report or describe(model), model))
    if job.teacher is not None:
        teach(model, job.teacher)
    made_with = {
        **settings.model_dump(mode="json"),
        "seed": job.seed,
        "start": model_identity(model),
        "teacher": None if job.teacher is None else model_identity(job.teacher),
        "images": dataset_identity(data.training),
        "validation images": None if data.validation is None else dataset_identity(data.validation),
    }
    weights = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    first = this_process().rank == 0
    if first:
        # The state holds weights, two moments and a mean of the weights; twice, for the old one goes last. Two models.
        prepare_folder(out, weights * (2 * (3 + (settings.ema is not None)) + 4), resume=resume)
    with stop_signals() as asked, together():
        trainer = Trainer(
            model,
            data.training,
            settings,
            seed=job.seed,
            teacher=job.teacher,
            device=job.device,
            stop=lambda: bool(asked),
            workers=job.workers,
        )
        if resume:
            trainer.load(read_state(out, made_with))
        done = trainer.progress
        log = Log(out, done.log_size) if first else None

        board = tensorboard_writer(out) if first and job.tensorboard else None

        def record(values: dict[str, Any]) -> None:
            if log is not None:
                done.log_size = log.write(values)
            if board is not None and values.get("loss") is not None:
                at = done.epoch * trainer.steps + done.step
                kind = "epoch" if key in values else "update"
                for name in ("loss", "learning_rate", key):
                    if values.get(name) is not None:
                        board.add_scalar(f"{kind}/{name}", values[name], at)
            if report is not None:
                report(values)

        def save() -> None:
            if first:
                write_state(out, {"settings": json.dumps(made_with), **trainer.state()})
            gathered(None)  # nobody goes on before it is written

        if not resume:
            record(provenance(job))
            save()
        total = settings.epochs * trainer.steps
        try:
            while len(done.epochs) < settings.epochs:
                start = time.perf_counter()
                if done.epoch == len(done.epochs):  # else one is trained, and was not judged or not written
                    for line in trainer.epoch():
                        record(line)
                        if progress is not None:
                            progress(done.epoch * trainer.steps + done.step, total)
                        if job.save_every and done.step % job.save_every == 0 and done.step < trainer.steps:
                            save()
                    save()  # whatever goes wrong when it is judged and written, it was not trained in vain
                _end_epoch(trainer, data, job, out, record, start)
                save()
        except Stopped:
            save()
        found = [folder if folder.exists() else None for folder in (out / LAST, out / BEST)]
        model.eval()
        # Where another process got the signal, this one stopped as for Ctrl-C.
        number = next(iter(asked), signal.SIGINT) if done.epoch < settings.epochs else 0
        return Finetuned(done.epochs, done.skipped, int(number), *found)


def _as_trained(report: Report, model: Backbone) -> Report:
    """`report` without what a repair said of the weights before; its side features stay."""
    if report.pruning is None or not isinstance(model.pruner, TokenPruner):
        return report
    pruning = report.pruning.model_copy(update={"repair": model.pruner.settings.repair})
    return report.model_copy(update={"pruning": pruning, "repair": None})


def _end_epoch(
    trainer: Trainer,
    data: Data,
    job: Job,
    out: Path,
    record: Callable[[dict[str, Any]], None],
    start: float,
) -> None:
    """Measure, and write the models."""
    done, weights = trainer.progress, trainer.weights
    as_first_process(weights)
    task, metric = TASKS.get(weights.task), None
    if data.validation is not None:
        training = weights.training
        judged = evaluate(weights, data.validation, device=str(trainer.accelerator.device))
        metric = task.estimate(judged.score).value
        weights.train(training)
    line = {"epoch": done.epoch, "loss": done.last_loss, task.key: metric, "seconds": time.perf_counter() - start}
    done.epochs.append(line)
    better = metric is not None and (done.best is None or metric > done.best)
    if better and done.epoch >= job.settings.progressive:  # with all tokens that will be dropped
        done.best, done.best_epoch = metric, done.epoch
    if this_process().rank == 0:
        files = artefact_files(job, done.epochs, done.skipped)
        for name in (LAST, *([BEST] if done.best_epoch == done.epoch else [])):
            checkpoint.save(out / name, weights, files, overwrite=True)
    record(line)


def artefact_files(job: Job, epochs: list[dict[str, Any]], skipped: int) -> dict[str, bytes | str]:
    """recipe.yaml and the like as they are, and report.json with what was trained."""
    assert job.report is not None
    known = ("epoch", "loss", TASKS.get(job.report.task).key)
    finetuning = FinetuningFacts(
        **provenance(job),
        epochs=tuple(EpochFacts(**{name: line[name] for name in known}) for line in epochs),
        skipped_updates=skipped,
    )
    stale = {TASKS.get(job.report.task).section: None, "limits": (), "samples": ()}  # of the weights before
    report = job.report.model_copy(update={**stale, "finetuning": finetuning})
    return {**job.files, **report_files(report, {})}


def provenance(job: Job) -> dict[str, Any]:
    """The first line of a log: what ran where."""
    return {
        "command": shown(job.command, MAX_MESSAGE),
        "settings": job.settings.model_dump(mode="json"),
        "seed": job.seed,
        "distilled": job.teacher is not None,
        "ssmprune": ssmprune_cli.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "accelerate": accelerate.__version__,
        "kernel": active_backend(job.device),
        "processes": this_process().processes,
        "threads": torch.get_num_threads(),
        "machine": machine(job.device),
    }


def tensorboard_writer(folder: Path) -> Any:
    """Writes events to `folder`/tensorboard. Raises UsageError without TensorBoard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("TensorBoard is missing", hint="pip install 'ssmprune[tensorboard]'") from error
    return SummaryWriter(folder / "tensorboard")


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Gives a list that SIGINT and SIGTERM join; the second one does what it would have done without this."""
    asked: list[int] = []
    old: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        asked.append(number)
        for each, handler in old.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        old[number] = signal.signal(number, handle)
    try:
        yield asked
    finally:
        for each, handler in old.items():
            signal.signal(each, handler)
