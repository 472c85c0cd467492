"""Train a backbone from scratch on images that fit in memory: AdamW, linear warm-up, cosine decay."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.data import batches
from ssmprune_cli.data.datasets import ImageDataset
from ssmprune_cli.errors import DataError, SsmpruneError, UsageError
from ssmprune_cli.kernels import active_backend
from ssmprune_cli.models.base import Backbone
from ssmprune_cli.preprocessing import Preprocessing

# Weight decay pulls a matrix towards "no effect". These are no such matrices: A_log 0 is a decay rate of 1, and tokens
# and positions are inputs. The Mamba authors exclude A_log and D too.
_UNDECAYED = (
    *("A_log", "A_b_log", "D", "D_b", "cls_token", "cls_token_head", "cls_token_tail", "pos_embed"),
    *("A_logs", "Ds", "dt_projs_bias"),  # VMamba
)


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises UsageError for values that make no sense.

    warmup_epochs  epochs (fractions allowed) in which the learning rate rises linearly from 0 to `learning_rate`; then
                   it falls to `final_learning_rate` along half a cosine
    clip_norm      largest norm of the whole gradient
    shift          images are moved by up to so many pixels each way, the border repeated
    flip           mirror half of the images left to right (not for digits or letters)
    seed           order of the images and augmentation
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_epochs: float = 1.0
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_norm: float = 1.0
    shift: int = 0
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError("training needs at least one epoch and one image in a batch")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UsageError(f"the learning rate must be positive, not {self.learning_rate:g}")
        if not 0 <= self.warmup_epochs <= self.epochs:
            raise UsageError(f"a warm-up of {self.warmup_epochs:g} epochs does not fit in {self.epochs} epochs")


@dataclass(frozen=True)
class LabelledImages:
    """Images in memory: `pixels` (N, 3, H, W) uint8, cropped to the model's size, and `labels` (N,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Epoch:
    """One line of the log. `top1` is the share of validation images that are right, None without validation images."""

    epoch: int
    learning_rate: float
    loss: float
    top1: float | None
    seconds: float


@dataclass(frozen=True)
class TrainResult:
    """What training did. `interrupted`: stopped by Ctrl-C; the weights are those reached by then."""

    epochs: tuple[Epoch, ...]
    interrupted: bool


def labelled_images(dataset: ImageDataset, preprocessing: Preprocessing) -> LabelledImages:
    """All of `dataset` in memory, resized and cropped as the model wants it. Raises DataError if it has no labels."""
    plain = replace(preprocessing, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels, labels = [], []
    for batch in batches(dataset, plain, 256):
        if batch.labels is None:
            raise DataError("has no label", where=batch.names[0])
        pixels.append((batch.images * 255).round().to(torch.uint8))
        labels.append(batch.labels)
    return LabelledImages(torch.cat(pixels), torch.cat(labels))


def train(
    model: Backbone,
    images: LabelledImages,
    validation: LabelledImages | None,
    settings: TrainSettings,
    *,
    log: Callable[[Epoch], None] | None = None,
) -> TrainResult:
    """Train `model` in place on `images`; the same input and seed give the same weights. `log` is called every epoch.

    Ctrl-C ends the training and not the program: the result then says `interrupted`. Raises SsmpruneError when the loss
    is not finite, and DataError when the images do not fit the model.
    """
    for part in (images, validation):
        if part is not None:
            _check(model, part)
    generator = torch.Generator().manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.learning_rate)
    done: list[Epoch] = []
    interrupted = False
    try:
        for number in range(1, settings.epochs + 1):
            start = time.perf_counter()
            loss, rate = _train_epoch(model, images, settings, optimizer, generator, number)
            top1 = None if validation is None else accuracy(model, validation, settings.batch_size)
            done.append(Epoch(number, rate, loss, top1, time.perf_counter() - start))
            if log is not None:
                log(done[-1])
    except KeyboardInterrupt:
        interrupted = True
    model.eval()
    return TrainResult(tuple(done), interrupted)


def _train_epoch(
    model: Backbone,
    images: LabelledImages,
    settings: TrainSettings,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    number: int,
) -> tuple[float, float]:
    """The mean loss of epoch `number` (from 1), and the learning rate at its end."""
    model.train()
    steps = math.ceil(len(images.labels) / settings.batch_size)
    total, rate = 0.0, 0.0
    for step, (pixels, labels) in enumerate(_shuffled(images, settings, generator), start=1):
        rate = learning_rate(settings, number - 1 + step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits = model(normalise(pixels, model.preprocessing))
        loss = functional.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
        value = loss.item()
        if not math.isfinite(value):
            raise SsmpruneError(f"the loss is {value}", where=f"epoch {number}, step {step}", hint="Lower `--lr`.")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()
        total += value * len(labels)
    return total / len(images.labels), rate


def accuracy(model: Backbone, images: LabelledImages, batch_size: int) -> float:
    """Share of `images` whose highest logit is at the right class. Leaves `model` in evaluation mode."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
            right += int((model(normalise(pixels, model.preprocessing)).argmax(dim=1) == labels).sum())
    return right / len(images.labels)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups: `weight_decay` for matrices and filters; none for biases, norms, A, D, tokens and positions."""
    decayed: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or name.rpartition(".")[2] in _UNDECAYED
        (rest if free else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def learning_rate(settings: TrainSettings, epoch: float) -> float:
    """The learning rate after `epoch` epochs (a fraction counts the steps of a started one)."""
    if epoch < settings.warmup_epochs:
        return settings.learning_rate * epoch / settings.warmup_epochs
    progress = (epoch - settings.warmup_epochs) / max(settings.epochs - settings.warmup_epochs, 1e-9)
    high, low = settings.learning_rate, settings.final_learning_rate
    return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def normalise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (B, 3, H, W) to the model's input."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return (pixels.float() / 255 - mean) / std


def shifted(pixels: Tensor, shift: int, generator: torch.Generator) -> Tensor:
    """`pixels` (B, 3, H, W), each image moved by -shift..shift pixels in both axes; border pixels are repeated."""
    batch, _, height, width = pixels.shape
    offset = torch.randint(-shift, shift + 1, (batch, 2), generator=generator)
    rows = (torch.arange(height) + offset[:, :1]).clamp(0, height - 1)  # (B, H)
    columns = (torch.arange(width) + offset[:, 1:]).clamp(0, width - 1)  # (B, W)
    moved = pixels[torch.arange(batch)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return moved.permute(0, 3, 1, 2)


def _shuffled(
    images: LabelledImages, settings: TrainSettings, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch in random order, augmented."""
    for index in torch.randperm(len(images.labels), generator=generator).split(settings.batch_size):
        pixels = images.pixels[index]
        if settings.shift:
            pixels = shifted(pixels, settings.shift, generator)
        if settings.flip:
            mirror = torch.rand(len(pixels), generator=generator) < 0.5
            pixels = torch.where(mirror[:, None, None, None], pixels.flip(3), pixels)
        yield pixels, images.labels[index]


def _check(model: Backbone, images: LabelledImages) -> None:
    if tuple(images.pixels.shape[2:]) != model.image_size:
        raise DataError(f"the images are {tuple(images.pixels.shape[2:])} pixels, the model takes {model.image_size}")
    if len(images.labels) == 0:
        raise DataError("there are no images")
    highest = int(images.labels.max())
    if highest >= model.num_classes:
        raise DataError(f"there is a label {highest}, and the model has {model.num_classes} classes (0 to N-1)")


def provenance(settings: TrainSettings, command: str) -> dict[str, Any]:
    """The first line of a training log: what ran where."""
    return {
        "command": command,
        "settings": asdict(settings),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": active_backend(),
        "threads": torch.get_num_threads(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def json_line(values: dict[str, Any]) -> str:
    return json.dumps(values) + "\n"
