"""A short training towards the dense model's answers to the calibration images: no labels, minutes.

What closed forms cannot mend, gradient steps can: all weights learn. One image of five is held back. Trained weights are
kept only if they are clearly better on those.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.data import ImageDataset, Subset, batches
from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.inference import prepare
from ssmprune_cli.models import Backbone
from ssmprune_cli.pruning import LEAST, clearly_less, divergence, fold_head, paired, repair
from ssmprune_cli.workflows.trials import Prepared, run

LEARNING_RATE = 2e-4  # at its highest: after a tenth of the steps; it then falls to nothing as a cosine does
BATCH_SIZE = 64
_WARM_UP = 0.1
_CLIP_NORM = 1.0
_FOLDS = 5  # one of them is held back


@dataclass(frozen=True)
class Distilled:
    """What came of it. Divergences are means of KL(dense || pruned) in nats on the images held back.

    steps     of the optimiser
    images    in all; `held_back` of them had no part in the training
    change    95 % interval of `after` - `before`
    accepted  whether the trained weights were kept
    """

    steps: int
    images: int
    held_back: int
    before: float
    after: float
    change: tuple[float, float]
    accepted: bool
    seconds: float


def distil(
    model: Backbone,
    images: ImageDataset,
    dense: Tensor,
    steps: int,
    *,
    seed: int = 0,
    done: Callable[[int, int], None] | None = None,
) -> Distilled:
    """Train `model`, in place, for so many steps; it is as it was if that is not clearly better.

    images  unlabelled
    dense   logits (images, classes) of the dense model for them
    Raises UsageError for another task than classification, DataError for too few images.
    """
    start = time.perf_counter()
    if model.task != "classification":
        raise UsageError(
            f"trains classifiers, and this is a model for {model.task}", where="--distill-steps",
            hint="`ssmprune finetune` trains a segmenter, with its masks.",
        )  # fmt: skip
    if len(images) < LEAST:
        raise DataError(f"{len(images)} images are too few to learn from: it takes {LEAST}", where="--distill-steps")
    every = torch.arange(len(images))
    learnt, held = every[every % _FOLDS != 0], every[every % _FOLDS == 0]
    judged, wanted = Subset(images, held.tolist()), dense[held]

    def distances() -> Tensor:
        return divergence(wanted, run(prepare(model), Prepared(model, judged, BATCH_SIZE)))

    kept = copy.deepcopy((model.pruner, model.state_dict()))
    # A repair has seen all images. For a fair start it is fitted again, without those that judge.
    parts = Prepared(model, Subset(images, learnt.tolist()), BATCH_SIZE)
    repair(model, parts, runner=prepare(model).with_pruner, dense=dense[learnt])
    before = distances()
    fold_head(model)
    model.eval()  # statistics of norms stay what many images have made them
    finite = _train(model, images, dense, learnt, steps, seed, done)
    after = distances() if finite else torch.full_like(before, math.inf)
    accepted = finite and clearly_less(after, before)
    if not accepted:
        model.pruner = kept[0]
        model.load_state_dict(kept[1])
    mean, error = paired(after, before)
    return Distilled(
        steps,
        len(images),
        len(held),
        float(before.mean()),
        float(after.mean()),
        (mean - 1.96 * error, mean + 1.96 * error),
        accepted,
        time.perf_counter() - start,
    )


def _train(
    model: Backbone,
    images: ImageDataset,
    dense: Tensor,
    learnt: Tensor,
    steps: int,
    seed: int,
    done: Callable[[int, int], None] | None,
) -> bool:
    """Whether all of it was finite."""
    device, draw = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    epochs = math.ceil(steps * BATCH_SIZE / len(learnt)) + 1
    order = torch.cat([learnt[torch.randperm(len(learnt), generator=draw)] for _ in range(epochs)])
    order = order[: steps * BATCH_SIZE]
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    parts = batches(Subset(images, order.tolist()), model.preprocessing, BATCH_SIZE)
    for step, (part, rows) in enumerate(zip(parts, order.split(BATCH_SIZE), strict=True), start=1):
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * _share(step / steps)
        logits = model(part.images.to(device, model.dtype))
        loss = functional.kl_div(
            logits.float().log_softmax(dim=1),
            dense[rows].to(device, torch.float32).log_softmax(dim=1),
            reduction="batchmean",
            log_target=True,
        )
        if not bool(loss.isfinite()):
            return False
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        optimiser.step()
        if done is not None:
            done(step, steps)
    return all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def _share(progress: float) -> float:
    """Of the highest learning rate, after this share of the steps."""
    if progress < _WARM_UP:
        return progress / _WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))
