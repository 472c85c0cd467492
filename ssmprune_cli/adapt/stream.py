"""Pruning inside a user's module: gather the tokens that are left, mix them, put the outputs back at their places.

The code around a mixer keeps its shapes, and so needs no change. Which tokens are left is decided by the pruner after a
mixer, and holds for the mixers behind it in the same stage. Letters: B batch, L tokens, K kept tokens, d model width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ssmprune_cli.adapt.mixers import Form, from_tokens, layout_of, to_tokens
from ssmprune_cli.adapt.swap import StandIn, Swapped
from ssmprune_cli.errors import UsageError
from ssmprune_cli.grids import Grid
from ssmprune_cli.interface import Mixer, Pruner, Stage
from ssmprune_cli.tokens import Dropped, TokenSequence, gather_tokens

# What stands at the places of dropped tokens in a mixer's output: nothing, the mean of the kept tokens' outputs, or the
# token's own output of the last mixer that saw it.
Fill = Literal["zero", "mean", "last"]
FILLS: tuple[Fill, ...] = get_args(Fill)


class Located(Mixer):
    """One mixer of a user's module, as pruning sees it."""

    per_direction: tuple[str, ...] = ()

    def __init__(self, module: nn.Module, form: Form) -> None:
        self.module, self.form = module, form
        self.d_model, self.d_inner, self.directions = form.d_model, form.d_inner, form.directions

    def null_delta(self) -> Tensor:
        return self.form.null_delta(self.module)


@dataclass
class _Pass:
    """What is known in one forward pass of the model.

    next    number of the module that is to be called next
    shape   (B, L) of the stage
    kept    the tokens that are left; None for all
    last    outputs (B, L, d) by what gave them, for the fill of that name
    """

    next: int = 0
    shape: tuple[int, int] = (0, 0)
    kept: TokenSequence | None = None
    last: dict[str, Tensor] = field(default_factory=dict)


class Stream:
    """The tokens of a user's module, while it runs: what its mixers and token-wise modules are given.

    mixers   in the order in which they are called, and their `names`
    order    names of mixers and token-wise modules, in the order in which they are called
    stages   of the mixers: runs of them that see as many tokens
    protect  positions that may never be dropped, negative ones from the end
    run      (batch) -> the model's answer
    """

    def __init__(
        self,
        mixers: Sequence[Located],
        names: Sequence[str],
        order: Sequence[str],
        stages: tuple[Stage, ...],
        protect: tuple[int, ...],
        run: Callable[[Any], Any],
    ) -> None:
        self.mixers, self.stages, self.protect, self.run = tuple(mixers), stages, protect, run
        self.pruner: Pruner | None = None
        self.fill: Fill = "zero"
        self.names, self.order = tuple(names), tuple(order)
        self._blocks = {name: block for block, name in enumerate(names)}
        self._order = {name: number for number, name in enumerate(order)}
        self._starts = {stage.start for stage in stages}
        self._passes: dict[int, _Pass] = {}  # by thread

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_passes": {}, "run": None}

    def observe(self, batch: Any) -> None:
        """Run the model, for a pruner that looks on."""
        self.run(batch)

    def refuse(self, name: str, reason: str) -> None:
        """An own path sees all tokens, so nothing may be missing: it is let through where nothing is dropped yet."""
        thread = threading.get_ident()
        if self._order[name] == 0:  # a pass that came to no end is over
            self._passes.pop(thread, None)
        here = self._passes.get(thread)
        if here is not None and here.kept is not None:
            raise UsageError(f"{reason}, while tokens are dropped", where=name, hint="`restore` the model first.")

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        module, form, name = swapped.__self__, swapped.form, swapped.name
        block = self._blocks[name]
        tokens, grid = to_tokens(x, form.layout)
        here = self._enter(name)
        self._measure(here, name, tokens, begins=block in self._starts)
        sequence = self._sequence(here, tokens, grid, name)
        pruner = self.pruner
        wanted = "nothing" if pruner is None else pruner.wants(block)
        alignment = None if pruner is None or sequence.is_dense else pruner.alignment(block)
        alignment = None if alignment is None else alignment.like(tokens)
        context = None if sequence.context is None else sequence.context.stream
        mixed, statistics = form.scan(module, sequence.hidden, sequence, alignment, wanted, context)
        filled = self._filled(here, "mixers", mixed, tokens.shape[1])
        if pruner is not None and wanted != "nothing":
            after = pruner(block, sequence, statistics)
            here.kept = None if after.is_dense else after
        self._leave(here, name)
        return from_tokens(filled, form.layout, grid)

    def tokenwise(self, stand_in: Tokenwise, x: Tensor) -> Any:
        """What a token-wise module makes of `x` (B, L, d) or (B, H, W, d), from the tokens that are left."""
        layout = layout_of(x)
        tokens, grid = to_tokens(x, layout)
        here = self._enter(stand_in.name)
        if here.shape != tokens.shape[:2]:  # before the first mixer of a stage
            found = stand_in.own(tokens)
        else:
            live = tokens if here.kept is None else gather_tokens(tokens, here.kept.positions)
            found = self._filled(here, stand_in.pattern, stand_in.own(live), tokens.shape[1])
        self._leave(here, stand_in.name)
        return from_tokens(found, layout, grid)

    def _enter(self, name: str) -> _Pass:
        """The pass that goes on with the module `name`. Its first module begins a new one, whatever became of the last.

        Raises UsageError for a call out of turn.
        """
        number, thread = self._order[name], threading.get_ident()
        if number == 0:
            self._passes[thread] = _Pass()
        here = self._passes.get(thread)
        if here is None or here.next != number:
            self._passes.pop(thread, None)
            expected = 0 if here is None else here.next
            raise UsageError(
                f"is called out of turn: next in the pass is {list(self._order)[expected]}",
                where=name,
                hint="Tokens are dropped along whole passes, each module once and in the order that calibration saw. "
                "Activation checkpointing, skipped layers and calls of single layers do not fit: `restore` the model.",
            )
        return here

    def _measure(self, here: _Pass, name: str, tokens: Tensor, *, begins: bool) -> None:
        """UsageError for a length that changed since the stage began, which it does with the mixer that `begins`."""
        shape = (tokens.shape[0], tokens.shape[1])
        if begins:
            here.shape, here.kept, here.last = shape, None, {}
        elif here.shape != shape:
            self._passes.pop(threading.get_ident(), None)
            raise UsageError(
                f"is given {shape[0]} x {shape[1]} tokens (samples x length), and the mixers before it had "
                f"{here.shape[0]} x {here.shape[1]}",
                where=name,
                hint="The model changes its length inside, and did not in calibration: calibrate on such inputs.",
            )

    def _leave(self, here: _Pass, name: str) -> None:
        here.next = self._order[name] + 1
        if here.next == len(self._order):
            self._passes.pop(threading.get_ident(), None)

    def _sequence(self, here: _Pass, tokens: Tensor, grid: Grid | None, name: str) -> TokenSequence:
        """Those of `tokens` (B, L, d) that are left, and what the convolutions see beside them."""
        if here.kept is None:
            return TokenSequence.dense(tokens, positions_of(self.protect, tokens.shape[1], name), grid=grid)
        kept, context = here.kept, here.kept.context
        if context is not None:
            context = Dropped(gather_tokens(tokens, context.positions), context.positions)
        return replace(kept, hidden=gather_tokens(tokens, kept.positions), context=context)

    def _filled(self, here: _Pass, source: str, outputs: Tensor, length: int) -> Tensor:
        """`outputs` (B, K, d) at the places of their tokens, and what `fill` says at the others: (B, L, d)."""
        if here.kept is None:
            filled = outputs
        else:
            places = here.kept.positions[..., None].expand_as(outputs)
            if self.fill == "last" and source in here.last:
                empty = here.last[source].to(outputs.dtype)
            elif self.fill == "mean":
                empty = outputs.mean(dim=1, keepdim=True).expand(-1, length, -1)
            else:
                empty = outputs.new_zeros(outputs.shape[0], length, outputs.shape[2])
            filled = empty.scatter(1, places, outputs)
        if self.fill == "last":
            here.last[source] = filled
        return filled


class Tokenwise(StandIn):
    """The `forward` of a module that sees one token at a time: it is given the tokens that are left.

    pattern  that named it: modules of one pattern fill in for one another
    """

    def __init__(self, module: nn.Module, name: str, pattern: str, stream: Stream) -> None:
        super().__init__(module, name)
        self.pattern, self.stream = pattern, stream

    def __call__(self, x: Tensor) -> Any:
        return self.stream.tokenwise(self, x)


def positions_of(protect: Sequence[int], length: int, where: str) -> tuple[int, ...]:
    """`protect` as positions in a sequence of `length` tokens, in rising order. UsageError for one that is outside."""
    for place in protect:
        if not -length <= place < length:
            raise UsageError(f"position {place} is protected, and there are {length} tokens", where=where)
    return tuple(sorted({place % length for place in protect}))


def stage_of(start: int, stop: int, length: int, protected: tuple[int, ...]) -> Stage:
    """Mixers from `start` to `stop` that see `length` tokens, `protected` ones (negative from the end) among them."""
    places = positions_of(protected, length, "protect")
    return Stage(start, stop, (1, length - len(places)), places)
