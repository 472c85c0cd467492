"""The training loop: Accelerate moves, scales and averages; what an update is, is said here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ssmprune_cli.data import ImageDataset
from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.models import Backbone, set_drop_path, set_recompute
from ssmprune_cli.pruning import TokenPruner
from ssmprune_cli.recipe import Training
from ssmprune_cli.workflows.finetune.guard import PATIENCE, first_non_finite
from ssmprune_cli.workflows.finetune.images import default_workers, epoch_parts, mixed_seed, part_size, steps_per_epoch
from ssmprune_cli.workflows.finetune.lessons import LESSONS
from ssmprune_cli.workflows.finetune.loss import Outputs, WithTokens, taught, total_loss
from ssmprune_cli.workflows.finetune.optimiser import learning_rate, optimiser
from ssmprune_cli.workflows.finetune.progressive import ProgressiveSchedule
from ssmprune_cli.workflows.finetune.state import Progress
from ssmprune_cli.workflows.processes import this_process


class Stopped(Exception):
    """The user asked the training to stop; everything up to the last update is done."""


class Trainer:
    """Trains `model` in place. `weights` is the model to evaluate and keep: its running mean, if there is one.

    stop     asked after every update: whether to stop
    workers  processes that prepare images; None is as many as the device needs
    """

    def __init__(
        self,
        model: Backbone,
        images: ImageDataset,
        settings: Training,
        *,
        seed: int = 0,
        teacher: Backbone | None = None,
        device: str = "cpu",
        stop: Callable[[], bool] = lambda: False,
        workers: int | None = None,
    ) -> None:
        self.accelerator = accelerator(settings.precision, device, find_unused=bool(model.places.idle))
        self.settings, self.seed, self.progress, self.model = settings, seed, Progress(), model
        self._images, self._stop, self._share = images, stop, this_process()
        self._lesson = LESSONS.get(model.task)
        self.steps = steps_per_epoch(images, settings)
        part_size(settings, self._share)  # raises before anything is done
        target = self.accelerator.device
        self._workers = default_workers(target, self._share.processes) if workers is None else workers
        model.to(target)
        self.ema = None
        if settings.ema is not None:
            self.ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
        self._schedule = None
        if settings.progressive and isinstance(model.pruner, TokenPruner):
            self._schedule = ProgressiveSchedule(model.pruner.settings.schedule, model.stages, settings.progressive)
        self._teacher = None if teacher is None else WithTokens(teacher.to(target).eval())
        set_drop_path(model.blocks, settings.drop_path)
        set_recompute(model.blocks, settings.recompute)
        self._forward = self.accelerator.prepare(WithTokens(model))
        self._optimizer = self.accelerator.prepare(optimiser(model, settings))

    @property
    def weights(self) -> Backbone:
        if self.ema is None:
            return self.model
        mean = self.ema.module
        assert isinstance(mean, Backbone)
        return mean

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "progress": asdict(self.progress),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.optimizer.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.progress = Progress(**state["progress"])
        # Without its metadata: a progressive training changes the schedule that stands there.
        self.model.load_state_dict(dict(state["model"]))
        self._optimizer.optimizer.load_state_dict(state["optimizer"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def epoch(self) -> Iterator[dict[str, Any]]:
        """Train what is left of the current epoch, and give the figures of every update.

        Raises Stopped, and SsmpruneError with a diagnosis after PATIENCE skipped updates in a row.
        """
        progress, settings = self.progress, self.settings
        if self._schedule is not None:
            for model in (self.model, self.weights):
                assert isinstance(model.pruner, TokenPruner)
                model.pruner.reschedule(self._schedule.at(progress.epoch))
        self._forward.train()
        with epoch_parts(
            self._images,
            self.model,
            settings,
            seed=self.seed,
            epoch=progress.epoch,
            first_step=progress.step,
            share=self._share,
            workers=self._workers,
        ) as parts:
            while progress.step < self.steps:
                yield self._update(parts)
                if self.accelerator.reduce(torch.tensor(float(self._stop())).to(self.accelerator.device)).item():
                    raise Stopped
        progress.last_loss = progress.loss / progress.counted if progress.counted else None
        progress.epoch, progress.step, progress.loss, progress.counted = progress.epoch + 1, 0, 0.0, 0

    def _update(self, parts: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """One step of the optimiser, or none if the loss or the gradient is not finite."""
        progress, settings = self.progress, self.settings
        start = time.perf_counter()
        rate = learning_rate(settings, progress.epoch + (progress.step + 1) / self.steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        torch.manual_seed(mixed_seed(self.seed, progress.epoch, progress.step, self._share.rank, 2))  # drop path
        self._optimizer.zero_grad()
        loss, finite = 0.0, True
        for number in range(settings.accumulate):
            images, targets = (tensor.to(self.accelerator.device) for tensor in next(parts))
            if not finite:
                continue
            last = number + 1 == settings.accumulate
            with nullcontext() if last else self.accelerator.no_sync(self._forward):
                outputs = Outputs(*self._forward(images))
                value = total_loss(outputs, targets, settings, taught(self._teacher, images), self._lesson)
                value = value / settings.accumulate
                loss += float(self.accelerator.reduce(value.detach(), "mean"))
                finite = math.isfinite(loss)  # the same in every process
                if finite:
                    self.accelerator.backward(value)
        done = finite and self._step()
        if done and self.ema is not None:
            self.ema.update_parameters(self.model)
        line = {"epoch": progress.epoch + 1, "step": progress.step + 1, "learning_rate": rate}
        progress.step += 1
        if done:
            progress.loss, progress.counted, progress.in_a_row = progress.loss + loss, progress.counted + 1, 0
        else:
            progress.skipped, progress.in_a_row = progress.skipped + 1, progress.in_a_row + 1
            self._optimizer.zero_grad()
            if progress.in_a_row >= PATIENCE:
                raise self._diagnosis(images, rate, loss)
        return {**line, "loss": loss if done else None, "seconds": time.perf_counter() - start}

    def _step(self) -> bool:
        """Clip the gradient and take a step; whether one was taken."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm or math.inf)
        scaler = self.accelerator.scaler
        if scaler is None and not math.isfinite(float(norm)):
            return False
        self._optimizer.step()
        # With fp16 an overflow makes the scale of the gradient smaller: that is not amiss until the scale is below 1.
        return not self._optimizer.step_was_skipped or (scaler is not None and scaler.get_scale() >= 1)

    def _diagnosis(self, images: Tensor, rate: float, loss: float) -> SsmpruneError:
        dtype = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[self.settings.precision]
        where = first_non_finite(self.model, self._forward, images)
        what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        return SsmpruneError(
            f"{what}, {PATIENCE} updates in a row; first not finite: {where}; learning rate {rate:.3g}, dtype {dtype}",
            where=f"epoch {self.progress.epoch + 1}, step {self.progress.step}",
            hint="Lower `--lr`, give more `--warmup`, or train in float32 (`--precision fp32`). "
            "The checkpoints of the last finished epoch are kept.",
        )


def accelerator(precision: str, device: str, *, find_unused: bool) -> Accelerator:
    """Raises UsageError if the device cannot compute in that precision."""
    states = (PartialState._shared_state, AcceleratorState._shared_state)
    if any(state and "distributed_type" not in state for state in states):
        # An earlier one in this process failed, and Accelerate would take what it left half made for whole.
        AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            cpu=device == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    except ValueError as error:
        raise UsageError(f"precision {precision} is not possible here: {error}", where="--precision") from error
