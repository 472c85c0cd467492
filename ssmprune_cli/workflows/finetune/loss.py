"""The loss: what the lesson says of the answers, and what the dense model says of the same images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.errors import UsageError
from ssmprune_cli.models import Backbone
from ssmprune_cli.recipe import Training
from ssmprune_cli.tokens import TokenSequence, gather_tokens
from ssmprune_cli.workflows.finetune.lessons import Lesson


@dataclass(frozen=True)
class Outputs:
    """logits (B, classes, ...); tokens (B, L, d) after the last block, and their positions (B, L)."""

    logits: Tensor
    tokens: Tensor
    positions: Tensor


class WithTokens(nn.Module):
    """A backbone whose forward also returns the tokens after its last block."""

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model
        self._last: TokenSequence | None = None
        model.blocks[-1].register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, inputs: object, outputs: tuple[TokenSequence, object]) -> None:
        self._last = outputs[0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.model(images)
        last, self._last = self._last, None
        assert last is not None
        return logits, last.stream, last.positions


def teach(student: Backbone, teacher: Backbone) -> None:
    """Raises UsageError unless the two see the same images and classes."""
    pairs = {
        "family": (student.family, teacher.family),
        "classes": (student.num_classes, teacher.num_classes),
        "image size": (student.image_size, teacher.image_size),
    }
    for what, (own, other) in pairs.items():
        if own != other:
            raise UsageError(f"the model to distil from has another {what}: {other}, not {own}", where="--distill")
    if teacher.pruner is not None:
        raise UsageError("the model to distil from drops tokens itself", where="--distill")


def total_loss(
    student: Outputs, targets: Tensor, settings: Training, teacher: Outputs | None, lesson: Lesson
) -> Tensor:
    """A mean, in float32. Without `teacher` the lesson's loss alone."""
    logits = student.logits.float()
    loss = lesson.loss(logits, targets, settings)
    if teacher is None:
        return loss
    temperature = settings.temperature
    divergence = functional.kl_div(
        functional.log_softmax(lesson.rows(logits) / temperature, dim=1),
        functional.log_softmax(lesson.rows(teacher.logits.float()) / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    # The square keeps the size of the gradient (arXiv 1503.02531).
    loss = (1 - settings.distill) * loss + settings.distill * temperature**2 * divergence
    if settings.distill_tokens:
        loss = loss + settings.distill_tokens * token_error(student, teacher)
    return loss


def token_error(student: Outputs, teacher: Outputs) -> Tensor:
    """Mean squared difference of the tokens that the student kept, each normalised over its channels."""
    kept = gather_tokens(teacher.tokens, student.positions)
    ours, theirs = (functional.layer_norm(tokens.float(), tokens.shape[-1:]) for tokens in (student.tokens, kept))
    return functional.mse_loss(ours, theirs)


@torch.no_grad()
def taught(teacher: WithTokens | None, images: Tensor) -> Outputs | None:
    """What the dense model says of `images`."""
    return None if teacher is None else Outputs(*teacher(images))
