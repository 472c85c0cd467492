"""A short training towards the dense model's answers to the calibration images: no labels, minutes.

What closed forms cannot mend, gradient steps can: all weights learn, from the images and from their mirror images. One
image of five is held back. The trained weights are kept only if they are clearly better on those.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import LEAST, Asked, clearly_less, divergence, fold_head, paired, repair
from ssmprune_cli.recipe import Training
from ssmprune_cli.report import DistillationFacts
from ssmprune_cli.workflows.trials import Prepared, run

# One "epoch" is all of the steps. The learning rate is about that of a fine-tuning: the model is nearly right.
SETTINGS = Training(epochs=1, batch_size=32, lr=3e-4, warmup_epochs=0.1, min_lr=0.0, weight_decay=0.0)
_AT_ONCE = 8  # images of an update that are in memory together: gradients of parts add up
_FOLDS = 5  # one of them is held back
_WHERE = "--distill-steps"


def check_distillable(model: Backbone) -> None:
    """UsageError for a model of another task than classification."""
    if model.task != "classification":
        raise UsageError(
            f"trains classifiers, and this is a model for {model.task}",
            where=_WHERE,
            hint="`ssmprune finetune` trains on images with labels or masks.",
        )


def distil(
    model: Backbone,
    images: ImageDataset,
    reference: Backbone,
    steps: int,
    *,
    dense: Tensor,
    kind: Asked,
    seed: int = 0,
    done: Callable[[int, int], None] | None = None,
) -> DistillationFacts:
    """Train `model`, in place, for so many steps; it is as it was if that is not clearly better.

    images     unlabelled, a part of which is held back
    reference  the dense model, which may be larger: each sees the images as it wants them
    dense      its logits (images, classes) of them
    kind       what `model` was repaired by. As that repair has seen all images, the training starts from another one,
               fitted without those that are held back
    Raises UsageError for a model that has nothing to learn, DataError for too few images.
    """
    start = time.perf_counter()
    check_distillable(model)
    if model.pruner is None and model.config == reference.config:
        raise UsageError("no token is dropped and the model is no smaller, so there is nothing to learn", where=_WHERE)
    if len(images) < LEAST:
        raise DataError(f"{len(images)} images are too few to learn from: it takes {LEAST}", where=_WHERE)
    every = torch.arange(len(images))
    learnt, held = every[every % _FOLDS != 0], every[every % _FOLDS == 0]
    mirrored = (part.flip(-1) for part in Prepared(reference, images, SETTINGS.batch_size))
    answers = (dense, run(prepare(reference), mirrored))
    judged = Subset(images, held.tolist())

    def distances() -> Tensor:
        return divergence(dense[held], run(prepare(model), Prepared(model, judged, SETTINGS.batch_size)))

    kept = copy.deepcopy((model.pruner, model.state_dict()))
    if kind != "none":
        parts = Prepared(model, Subset(images, learnt.tolist()), SETTINGS.batch_size)
        repair(model, parts, kind=kind, runner=prepare(model).with_pruner, dense=dense[learnt])
    before = distances()
    if not bool(before.isfinite().all()):
        raise DataError("the pruned model's answers are not finite, so there is nothing to start from", where=_WHERE)
    fold_head(model)
    model.eval()  # statistics of norms stay what many images have made them
    finite = _train(model, images, answers, learnt, steps, seed, done)
    after = distances() if finite else torch.full_like(before, math.inf)
    accepted = finite and bool(after.isfinite().all()) and clearly_less(after, before)
    if not accepted:
        model.pruner = kept[0]
        model.load_state_dict(kept[1])
    mean, error = paired(after, before)
    known = math.isfinite(mean)
    return DistillationFacts(
        steps=steps,
        images=len(images),
        held_back=len(held),
        divergence_before=float(before.mean()),
        divergence_after=float(after.mean()) if known else None,
        change_interval=(mean - 1.96 * error, mean + 1.96 * error) if known else None,
        kept=accepted,
        seconds=time.perf_counter() - start,
    )


def _train(
    model: Backbone,
    images: ImageDataset,
    answers: tuple[Tensor, Tensor],
    learnt: Tensor,
    steps: int,
    seed: int,
    done: Callable[[int, int], None] | None,
) -> bool:
    """Whether all of it was finite."""
    from ssmprune_cli.workflows.finetune import learning_rate, optimiser  # Accelerate takes a second to import

    size, draw = SETTINGS.batch_size, torch.Generator().manual_seed(seed)
    rounds = math.ceil(steps * size / len(learnt))
    order = torch.cat([learnt[torch.randperm(len(learnt), generator=draw)] for _ in range(rounds)])[: steps * size]
    adam, like = optimiser(model, SETTINGS), next(model.parameters())
    parts = batches(Subset(images, order.tolist()), model.preprocessing, size)
    for step, (part, rows) in enumerate(zip(parts, order.split(size), strict=True), start=1):
        for group in adam.param_groups:
            group["lr"] = learning_rate(SETTINGS, step / steps)
        turned = torch.rand(len(rows), generator=draw) < 0.5
        seen = torch.where(turned[:, None, None, None], part.images.flip(-1), part.images)
        wanted = torch.where(turned[:, None], answers[1][rows], answers[0][rows])
        adam.zero_grad()
        for few, target in zip(seen.split(_AT_ONCE), wanted.split(_AT_ONCE), strict=True):
            loss = functional.kl_div(
                model(few.to(like.device, like.dtype)).float().log_softmax(dim=1),
                target.to(like.device, torch.float32).log_softmax(dim=1),
                reduction="sum",
                log_target=True,
            )
            (loss / size).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        if not math.isfinite(float(norm)):
            return False
        adam.step()
        if done is not None:
            done(step, steps)
    adam.zero_grad()
    return True
