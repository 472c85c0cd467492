"""What a session is, and the kind that runs any module as it is."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import SsmpruneError, UsageError
from ssmprune_cli.inference.behaviour import global_hooks
from ssmprune_cli.inference.copying import cloned, shallow
from ssmprune_cli.inference.explain import BY_OP, Explanation, Journal, complete
from ssmprune_cli.interface import Pruner, placed
from ssmprune_cli.models import Backbone, DenseModel

S = TypeVar("S", bound="Session")


class Session(nn.Module, ABC):
    """A snapshot of a model, to be called on images. Make one with `prepare`.

    It never follows later changes of the model, and cannot be changed itself: for other weights, another device or
    precision, prepare the model again. Needs no `torch.no_grad`, and records no gradients.

    definition  the snapshot, op by op
    kind        its name
    silent      how a block is computed of which nothing is noted
    watched     whether its ops are torch's, and can be seen and counted
    """

    kind: ClassVar[str]
    silent: ClassVar[str] = BY_OP
    watched: ClassVar[bool] = True
    definition: nn.Module

    def __init__(self, definition: nn.Module, refused: dict[str, str]) -> None:
        super().__init__()
        self.definition = definition
        self.training = False
        self._refused = refused
        self._journal = Journal()
        self._sealed = True

    @classmethod
    @abstractmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        """Why this kind of session cannot run `definition`; None if it can."""

    @abstractmethod
    def compute(self, images: Tensor) -> Tensor:
        """The model's output for `images` on its device and in its dtype."""

    def forward(self, images: Tensor) -> Tensor:
        """The model's output, logits (B, classes) of a backbone, for normalised images (B, 3, H, W); of a language
        model (B, vocabulary, K) for numbers of tokens (B, L). A detector's is a tuple, see `models.Detector`.

        Images of another floating-point dtype or on another device are converted. Raises UsageError under autocast:
        the precision of a session was settled when it was prepared.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise UsageError(
                "a session computes in the precision that it was prepared for",
                hint="Call it outside of autocast, and give `prepare(model, dtype=torch.bfloat16)`.",
            )
        with torch.inference_mode():
            output = self.compute(placed(images, self.device, self.dtype))
        copied: Tensor = cloned(output)  # made outside, it is an ordinary tensor, which a training may use
        return copied

    def with_pruner(self: S, pruner: Pruner | None) -> S:
        """A session of the same weights with another pruner, of which it takes a copy; None is the dense model."""
        if not isinstance(self.definition, Backbone):
            raise UsageError(f"a {type(self.definition).__name__} has no slot for a pruner")
        taken = copy.deepcopy(pruner)
        if isinstance(taken, nn.Module):
            taken.to(self.device, self.dtype).eval().requires_grad_(False)
        other = shallow(self)
        other._modules["definition"] = with_slot(self.definition, taken)
        other.repruned(taken)
        return other

    def repruned(self, pruner: Pruner | None) -> None:
        """Called on a copy that `with_pruner` has made: put `pruner` wherever else one is."""

    def explain(self) -> Explanation:
        """How the blocks are computed, and why: one black image, or a window of text, is computed to see it."""
        definition = self.definition
        if not isinstance(definition, Backbone):
            return Explanation(self.kind, self._refused, (), self.notes())
        with self._journal.listening() as steps, torch.inference_mode():
            self.observed(definition.example(1))
        steps_of_all = complete(steps, len(definition.mixers), self.silent, self.reasons())
        return Explanation(self.kind, self._refused, steps_of_all, self.notes())

    def observed(self, images: Tensor) -> None:
        """Compute so that the journal, and whoever watches ops, sees what is done."""
        self.compute(images)

    def tensors(self) -> list[Tensor]:
        """All that the session holds: the weights, and those in another order."""
        return [*self.parameters(), *self.buffers()]

    def reasons(self) -> dict[int, str]:
        """Why blocks, counted from 0, are computed op by op."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """What `explain` says of the whole model."""
        return ()

    @property
    def device(self) -> torch.device:
        return next((each.device for each in self.definition.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        floating = (each.dtype for each in self.definition.parameters() if each.is_floating_point())
        return next(floating, torch.get_default_dtype())

    @property
    def computes_in(self) -> str:
        """The name of the numbers that it computes with, such as float32."""
        return str(self.dtype).removeprefix("torch.")

    def train(self: S, mode: bool = True) -> S:
        """Raises UsageError for `train()`: a session is for inference."""
        if mode:
            raise UsageError("a session cannot be trained", hint="Train the model, and prepare it again.")
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Raises UsageError: a session is a snapshot."""
        raise UsageError("a session takes no weights", hint="Load them into the model, and prepare it again.")

    def _apply(self: S, fn: Any, recurse: bool = True) -> S:
        # What moves or converts a module comes this way.
        if self.__dict__.get("_sealed"):
            raise UsageError(
                "a session stays on its device and in its precision",
                hint="Give `prepare(model, device=..., dtype=...)`.",
            )
        applied: S = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.definition).__name__}, {self.device}, {self.dtype})"


class PlainSession(Session):
    """Calls the snapshot as it is: any module, on any device."""

    kind = "plain"

    @classmethod
    def refuses(cls, definition: nn.Module) -> str | None:
        return None

    def compute(self, images: Tensor) -> Tensor:
        output: Tensor = self.definition(images)
        return output


def with_slot(model: Backbone, pruner: Pruner | None) -> Backbone:
    """A backbone of the same modules with another pruner."""
    other = shallow(model)
    if isinstance(other, DenseModel):  # the slot is its encoder's
        other._modules["encoder"] = with_slot(other.encoder, pruner)
        return other
    other._modules.pop("pruner", None)  # a slot that holds a module takes nothing else
    other.__dict__.pop("pruner", None)
    other.pruner = pruner
    return other


def refuse_global_hooks() -> None:
    """Raises SsmpruneError if there are hooks that torch would call around every module: fused calls skip modules."""
    if global_hooks():
        raise SsmpruneError(
            "hooks for all modules were registered after this session was prepared, and it skips modules",
            hint="Remove them, or prepare the model again while they are there: it then runs op by op.",
        )
