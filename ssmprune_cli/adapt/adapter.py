"""The Adapter: a user's model as a row of blocks, whose sequence gets shorter for good.

For models whose mixers are not recognised, and where pruning inside mixers leaves too much at full length: here norms,
MLPs and whatever else is in a block run on the tokens that are left.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ssmprune_cli.adapt.stream import Located, positions_of
from ssmprune_cli.adapt.swap import Swapped, swapped_in
from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import Mixer, Pruner, ScanAlignment, ScanStatistics, Stage, Wanted
from ssmprune_cli.tokens import TokenSequence


class Adapter(nn.Module, ABC):
    """Says how a model embeds, what its blocks are, how one is called, and what its head does. Call it as the model.

        class MyAdapter(ssmprune.Adapter):
            def embed(self, images):
                return self.model.patch_embed(images) + self.model.pos_embed

            def block(self, block, tokens):
                return block(tokens)

            def head(self, tokens, positions):
                return self.model.head(self.model.norm(tokens).mean(dim=1))

        model = MyAdapter(mine, mine.layers)
        ssmprune.compress(model, keep=0.7, points=[6, 12], calibration=images)

    model    the user's: its weights stay where they are
    blocks   modules of it, each of which takes and gives tokens (B, L, d); they are called in this order
    protect  positions that are never dropped, negative ones from the end

    In a block with one recognised mixer the scan is aligned and tells the score. Blocks without one can only be pruned
    by `importance="hidden-norm"` (or "random", "class-similarity") and `alignment="none"`.
    """

    pruner: Pruner | None

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], protect: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model
        inside = {id(module): name for name, module in model.named_modules()}
        if not blocks or any(id(block) not in inside for block in blocks):
            raise UsageError("the blocks of an Adapter are modules of its model", where="blocks")
        if len({id(block) for block in blocks}) < len(blocks):
            raise UsageError("a block is listed twice", where="blocks")
        self.names = tuple(inside[id(block)] for block in blocks)
        self.protect = tuple(protect)
        self.pruner = None
        self.length = 0  # tokens of the last dense pass
        self._now = _Now()

    @abstractmethod
    def embed(self, *inputs: Any, **options: Any) -> Tensor:
        """The model's inputs as tokens (B, L, d), as they enter the first block."""

    def block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """What `block` makes of `tokens` (B, K, d), of which some may have been dropped. A block that also gives a
        residual gives their sum here."""
        result: Tensor = block(tokens)
        return result

    @abstractmethod
    def head(self, tokens: Tensor, positions: Tensor) -> Any:
        """The model's answer, from the tokens (B, K, d) behind the last block and their `positions` (B, K) in all."""

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.model.get_submodule(name) for name in self.names]

    @property
    def swapped(self) -> list[Swapped | None]:
        """The recognised mixer of each block. UsageError for a block with two."""
        found: list[Swapped | None] = []
        for name, block in zip(self.names, self.blocks, strict=True):
            inside = swapped_in(block)
            if len(inside) > 1:
                what = f"has {len(inside)} mixers; the blocks of an Adapter have one each, or none"
                raise UsageError(what, where=name, hint="List the parts of it as blocks.")
            found.append(inside[0] if inside else None)
        return found

    @property
    def mixers(self) -> list[Mixer]:
        return [_Unknown() if each is None else Located(each.__self__, each.form) for each in self.swapped]

    @property
    def stages(self) -> tuple[Stage, ...]:
        protected = positions_of(self.protect, self.length, "protect")
        return (Stage(0, len(self.names), (1, self.length - len(protected)), protected),)

    def observe(self, batch: Any) -> None:
        """Run on a batch, for a pruner that looks on."""
        batch.given_to(self)

    def embedded(self, *inputs: Any, **options: Any) -> Tensor:
        """What `embed` gives. UsageError if it is no (B, L, d)."""
        tokens = self.embed(*inputs, **options)
        if tokens.ndim != 3:
            raise UsageError(f"`embed` gives {tuple(tokens.shape)}, not tokens (B, L, d)", where=type(self).__name__)
        return tokens

    def forward(self, *inputs: Any, **options: Any) -> Any:
        tokens = self.embedded(*inputs, **options)
        if self.pruner is None:
            self.length = tokens.shape[1]
        sequence = TokenSequence.dense(tokens, positions_of(self.protect, tokens.shape[1], "protect"))
        for number, block in enumerate(self.blocks):
            pruner = self.pruner
            wanted: Wanted = "nothing" if pruner is None else pruner.wants(number)
            alignment = None if pruner is None or sequence.is_dense else pruner.alignment(number)
            call = _Call(sequence, alignment, wanted)
            with self._now.during(call):
                after = self.block(block, sequence.hidden)
            if after.shape != sequence.hidden.shape:
                raise UsageError(
                    f"gives {tuple(after.shape)} of tokens {tuple(sequence.hidden.shape)}",
                    where=self.names[number],
                    hint="A block keeps the shape of its tokens. What changes it belongs into `embed` or `head`.",
                )
            sequence = replace(sequence, hidden=after)
            if pruner is not None and wanted != "nothing":
                sequence = pruner(number, sequence, self._statistics(number, block, call))
        return self.head(sequence.hidden, sequence.positions)

    def _statistics(self, number: int, block: nn.Module, call: _Call) -> ScanStatistics:
        """Of the block that has run. Empty for one without a recognised mixer, of which `compress` asks for none."""
        if call.said is None and swapped_in(block):
            raise UsageError(
                "its mixer was not called, or took its own path, so nothing tells the score",
                where=self.names[number],
                hint='Use `importance="hidden-norm"` and `alignment="none"`, which need none.',
            )
        return ScanStatistics() if call.said is None else call.said

    def install(self) -> None:
        """Let the recognised mixers know which tokens they are given."""
        for each in self.swapped:
            if each is not None:
                each.place = self._now


@dataclass
class _Call:
    """What the mixer of the block that runs now is to know, and what it says."""

    sequence: TokenSequence
    alignment: ScanAlignment | None
    wanted: Wanted
    said: ScanStatistics | None = None


class _Now:
    """The place of an Adapter's mixers; see `swap.Place`. Each thread has a call of its own."""

    def __init__(self) -> None:
        self._calls: dict[int, _Call] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_calls": {}}

    @contextmanager
    def during(self, call: _Call) -> Iterator[None]:
        self._calls[threading.get_ident()] = call
        try:
            yield
        finally:
            self._calls.pop(threading.get_ident(), None)

    def mix(self, swapped: Swapped, x: Tensor) -> Tensor:
        call = self._calls.get(threading.get_ident())
        if call is None:
            raise UsageError(
                "is called outside of the Adapter's pass, where nothing says which tokens these are",
                where=swapped.name,
                hint="Call the Adapter itself, without activation checkpointing, or `restore` it.",
            )
        if call.said is not None:
            raise UsageError(
                "is called twice in one block, and the tokens of a block go through its mixer once",
                where=swapped.name,
                hint="Give each of its calls a module of its own, and list the parts as blocks.",
            )
        if x.shape[:2] != call.sequence.positions.shape or swapped.form.layout != "tokens":
            raise UsageError(
                f"is given {tuple(x.shape)}, and its block the tokens {tuple(call.sequence.hidden.shape)}",
                where=swapped.name,
                hint="In an Adapter, blocks go over one sequence of tokens and keep its length.",
            )
        alignment = None if call.alignment is None else call.alignment.like(x)
        here = replace(call.sequence, hidden=x, residual=None)
        mixed, call.said = swapped.form.scan(swapped.__self__, x, here, alignment, call.wanted, None)
        return mixed

    def refuse(self, name: str, reason: str) -> None:
        raise UsageError(f"{reason}, which an Adapter has no answer to", where=name, hint="Call it in `block` without.")


class _Unknown(Mixer):
    """In the place of a mixer that is not recognised: nothing of it is known."""

    per_direction: tuple[str, ...] = ()
    d_model, d_inner, directions = 0, 0, 0

    def null_delta(self) -> Tensor:
        raise UsageError(
            "a block without a recognised mixer has no steps to align",
            hint='Use `alignment="none"` and `importance="hidden-norm"`.',
        )
