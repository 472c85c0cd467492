"""The sequence of tokens that flows through a backbone.

With `interface.py` this is all that `models` and `pruning` share. Letters: B batch, L tokens now, d model width.
A token's *position* is its index in the dense sequence. It never changes; gaps and ranks are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Dropped:
    """Tokens that no block updates any more, as they were when they left.

    stream    (B, M, d) residual stream with the last block's output added
    positions (B, M) int64 index of each token in the dense sequence
    size      (B, M) float32 dense tokens that each stands for; None is one each
    """

    stream: Tensor
    positions: Tensor
    size: Tensor | None = None

    def join(self, other: Dropped | None) -> Dropped:
        """These tokens and the others."""
        if other is None:
            return self
        return Dropped(
            torch.cat((self.stream, other.stream), dim=1),
            torch.cat((self.positions, other.positions), dim=1),
            joined_sizes((self.size, other.size), (self.positions, other.positions)),
        )

    def take(self, index: Tensor) -> Dropped:
        """The tokens at `index` (B, K)."""
        size = None if self.size is None else self.size.gather(1, index)
        return Dropped(gather_tokens(self.stream, index), self.positions.gather(1, index), size)


@dataclass(frozen=True)
class Readout:
    """How a pruner makes up at the head for what was dropped. C classes, d features.

    side  (B, d) added to what the head sees, or None
    head  weight (C, d) and bias (C,) of a head in the place of the model's, or None
    """

    side: Tensor | None = None
    head: tuple[Tensor, Tensor] | None = None

    def logits(self, pooled: Tensor, layer: nn.Linear) -> Tensor:
        """(B, C) of `pooled` (B, d), what the model's own head, `layer`, would see."""
        features = pooled if self.side is None else pooled + self.side
        if self.head is not None:
            return functional.linear(features, *self.head)
        logits: Tensor = layer(features)
        return logits


Fate = Literal["gone", "context", "frozen"]
T = TypeVar("T")


@dataclass(frozen=True)
class Derivation(Generic[T]):
    """Names one kind of thing that is derived from the tokens of a sequence: a T."""

    name: str


@dataclass(frozen=True)
class Geometry:
    """What has been derived from the positions of a sequence's tokens. All blocks between two prune points share it."""

    _derived: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, derivation: Derivation[T], compute: Callable[[], T], *parameters: Hashable) -> T:
        """What `compute` gave when `derivation` was first asked for with these `parameters`."""
        key = (derivation, *parameters)
        if key not in self._derived:
            self._derived[key] = compute()
        result: T = self._derived[key]
        return result


@dataclass(frozen=True)
class _Joined:
    """Live and frozen tokens in ascending position.

    order      (B, L + F) row of each in the live ones followed by the frozen ones
    rows       (B, L) row of each live token among both
    positions  (B, L + F)
    size       (B, L + F) or None
    geometry   of the joined sequence
    """

    order: Tensor
    rows: Tensor
    positions: Tensor
    size: Tensor | None
    geometry: Geometry


_GAPS = Derivation[Tensor]("gaps")
_JOINED = Derivation[_Joined]("joined")


@dataclass(frozen=True)
class TokenSequence:
    """Tokens between two blocks: live ones, which the blocks update, and dropped ones that something still needs.

    hidden    (B, L, d) output of the last block
    residual  (B, L, d) residual stream, or None before the first block
    positions (B, L) int64 index of each token in the dense sequence; ascending except after `drop-unsorted`
    length    number of tokens in the dense sequence
    protected dense positions that may never be dropped (class and register tokens), the same in every sample
    size      (B, L) float32 dense tokens that each token stands for, itself included; None is one each. See `merge`
    live      (B, L) bool, or None when every token is live; only the comparison reduction `mask` sets it
    frozen    dropped tokens that go on feeding the scans and convolutions: they are read, never updated
    context   dropped tokens that only the convolutions go on seeing
    pooled    whether frozen tokens reach the scans through the live token nearest to each, in its step
    gone      dropped tokens that wait for `restored`
    restorable  whether `restored` will be asked for, in models that make the grid whole again
    readout   what the pruner has to say at the head; None for nothing
    geometry  what has been derived from the positions
    """

    hidden: Tensor
    residual: Tensor | None
    positions: Tensor
    length: int
    protected: tuple[int, ...] = ()
    size: Tensor | None = None
    live: Tensor | None = None
    frozen: Dropped | None = None
    context: Dropped | None = None
    pooled: bool = False
    gone: Dropped | None = None
    restorable: bool = False
    readout: Readout | None = None
    # A function, since torch.compile (2.13) cannot call the class from here.
    geometry: Geometry = field(default_factory=lambda: Geometry(), compare=False, repr=False)

    @classmethod
    def dense(
        cls,
        hidden: Tensor,
        protected: tuple[int, ...] = (),
        *,
        restorable: bool = False,
        readout: Readout | None = None,
    ) -> TokenSequence:
        """All tokens of `hidden` (B, L, d), none dropped yet."""
        batch, length = hidden.shape[0], hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).expand(batch, length)
        return cls(hidden, None, positions, length, protected, restorable=restorable, readout=readout)

    @property
    def is_dense(self) -> bool:
        """Whether no token has been dropped. Known from shapes alone, so it is static under export."""
        return self.positions.shape[1] == self.length

    @property
    def stream(self) -> Tensor:
        """(B, L, d), float32 at least: the residual stream with the last block's output added to it."""
        return _stream(self.hidden, self.residual)

    def keep(self, index: Tensor, *, others: Fate = "gone") -> TokenSequence:
        """Keep the tokens at `index` (B, K), in that order; `others` says what the rest is still good for.

        This and `merge` are the only places where tokens are dropped.
        """
        fates: dict[str, Dropped | None] = {}
        if others != "gone" or self.restorable:
            fates[others] = self._without(index).join(getattr(self, others))
        rows = _rows(index, self.hidden.shape[1])
        return replace(
            self,
            hidden=_take(self.hidden, index, rows),
            residual=None if self.residual is None else _take(self.residual, index, rows),
            positions=self.positions.gather(1, index),
            size=None if self.size is None else self.size.gather(1, index),
            live=None if self.live is None else self.live.gather(1, index),
            geometry=Geometry(),
            **fates,  # type: ignore[arg-type]
        )

    def lost(self, after: TokenSequence) -> Tensor:
        """(B, M, d): `stream` of the tokens that `after`, a reduction of this sequence, does not hold any more."""
        stays = self.positions.new_zeros(len(self.positions), self.length).scatter(
            1, after.positions, torch.ones_like(after.positions)
        )
        order = stays.gather(1, self.positions).argsort(dim=1, stable=True)
        index = order[:, : self.positions.shape[1] - after.positions.shape[1]]
        rows = _rows(index, self.hidden.shape[1])
        residual = None if self.residual is None else _take(self.residual, index, rows)
        return _stream(_take(self.hidden, index, rows), residual)

    def retire(self) -> TokenSequence:
        """Frozen tokens stop feeding anything."""
        gone = self.frozen.join(self.gone) if self.frozen is not None and self.restorable else self.gone
        return replace(self, frozen=None, gone=gone, geometry=Geometry())

    def _without(self, index: Tensor) -> Dropped:
        """The tokens that are not at `index` (B, K), in ascending order of theirs."""
        left = torch.ones_like(self.positions).scatter(1, index, 0)
        left = left.argsort(dim=1, descending=True, stable=True)[:, : self.positions.shape[1] - index.shape[1]]
        size = None if self.size is None else self.size.gather(1, left)
        return Dropped(gather_tokens(self.stream, left), self.positions.gather(1, left), size)

    def merge(self, index: Tensor, target: Tensor, weight: Tensor | None = None) -> TokenSequence:
        """Keep the tokens at `index` (B, K), each at its own position, and average others into them.

        target  (B, L): for each token the place in `index` of the token that takes it in (for those at `index`, their
                own), or -1 for one that is left out
        weight  (B, L) of each token in the mean that it joins; None is its size

        Hidden state and residual become weighted means; sizes add up.
        """
        joins, place = target >= 0, target.clamp(min=0)

        def total(values: Tensor) -> Tensor:
            return torch.zeros_like(values[:, : index.shape[1]]).scatter_add(1, place, values * joins)  # (B, K)

        size = total(self.sizes())
        # The share of each token in its mean, in float32: a token alone has exactly 1, in any precision.
        whole = size if weight is None else total(weight)
        share = (self.sizes() if weight is None else weight) * joins / whole.gather(1, place)

        def mean(values: Tensor) -> Tensor:
            return sum_tokens(values * share[..., None].to(values.dtype), place, index.shape[1])

        kept = self.keep(index)
        residual = None if self.residual is None else mean(self.residual)
        return replace(kept, hidden=mean(self.hidden), residual=residual, size=size)

    def sizes(self) -> Tensor:
        """(B, L) float32: dense tokens that each token stands for."""
        return torch.ones_like(self.positions, dtype=torch.float32) if self.size is None else self.size

    def joined(self, values: Tensor, frozen: Tensor) -> tuple[TokenSequence, Tensor]:
        """Live and frozen tokens as one sequence in ascending position, and the row (B, L) of each live token in it.

        `values` (B, L, c) of the live and `frozen` (B, F, c) of the frozen tokens become its hidden state.
        """
        assert self.frozen is not None
        both = self.geometry.once(_JOINED, self._join)
        hidden = gather_tokens(torch.cat((values, frozen), dim=1), both.order)
        whole = replace(
            self,
            hidden=hidden,
            residual=None,
            positions=both.positions,
            size=both.size,
            frozen=None,
            geometry=both.geometry,
        )
        return whole, both.rows

    def _join(self) -> _Joined:
        assert self.frozen is not None
        positions = torch.cat((self.positions, self.frozen.positions), dim=1)
        positions, order = positions.sort(dim=1)  # (B, L + F)
        size = joined_sizes((self.size, self.frozen.size), (self.positions, self.frozen.positions))
        size = None if size is None else size.gather(1, order)
        return _Joined(order, order.argsort(dim=1)[:, : self.positions.shape[1]], positions, size, Geometry())

    def restored(self) -> Tensor:
        """(B, length, d): the dense sequence, dropped tokens as they were when they left. For `restorable` sequences.

        The reduction `mask` drops nothing, so its zeroed tokens stay what they are.
        """
        groups = [each for each in (self.frozen, self.context, self.gone) if each is not None]
        if not groups:
            return self.hidden
        values = self.hidden.new_empty(len(self.hidden), self.length, self.hidden.shape[2])
        for group in groups:
            values = _put(values, group.positions, group.stream)
        return _put(values, self.positions, self.hidden)

    def is_protected(self) -> Tensor:
        """(B, L) bool: which tokens may not be dropped."""
        masks = [self.positions == place for place in self.protected]
        return reduce(or_, masks) if masks else torch.zeros_like(self.positions, dtype=torch.bool)

    def protected_stream(self) -> Tensor:
        """(B, P, d): `stream` of the P protected tokens, of which there must be one, in the order of `protected`."""
        ranks = [] if self.is_dense else [(self.positions == place).int().argmax(dim=1) for place in self.protected]

        def pick(values: Tensor) -> Tensor:
            if ranks:
                return gather_tokens(values, torch.stack(ranks, dim=1))
            return torch.stack([values[:, place] for place in self.protected], dim=1)

        return _stream(pick(self.hidden), None if self.residual is None else pick(self.residual))

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (B, L, c) over the live tokens, weighted by size: (B, c)."""
        if self.live is None and self.size is None:
            return values.mean(dim=1)
        weight = (self.sizes() if self.live is None else self.live).to(values.dtype)[..., None]  # (B, L, 1)
        return (values * weight).sum(dim=1) / weight.sum(dim=1)

    def gaps(self, *, reverse: bool) -> Tensor:
        """(B, L) float32: how many dropped tokens a raster scan skips just before each token.

        In a reverse scan "before" is the side of higher positions. The first token of a scan gets 0: the state is still
        zero there, so what was skipped cannot matter.
        """
        return self.both_gaps()[int(reverse)]

    def both_gaps(self) -> Tensor:
        """(2, B, L): `gaps` of a scan and of one in reverse."""

        def compute() -> Tensor:
            skipped = (self.positions[:, 1:] - self.positions[:, :-1] - 1).float()  # (B, L-1)
            zero = skipped.new_zeros(len(skipped), 1)
            return torch.stack((torch.cat((zero, skipped), dim=1), torch.cat((skipped, zero), dim=1)))

        return self.geometry.once(_GAPS, compute)


def _stream(hidden: Tensor, residual: Tensor | None) -> Tensor:
    stream = hidden if residual is None else residual + hidden
    return stream.to(torch.promote_types(stream.dtype, torch.float32))


def joined_sizes(sizes: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor | None:
    """Sizes of several groups of tokens, side by side; None if no group has any. `like` are (B, n) each."""
    if all(size is None for size in sizes):
        return None
    ones = (torch.ones_like(each, dtype=torch.float32) for each in like)
    return torch.cat([one if size is None else size for size, one in zip(sizes, ones, strict=True)], dim=1)


def _put(values: Tensor, positions: Tensor, tokens: Tensor) -> Tensor:
    """`values` (B, G, d) with `tokens` (B, M, d) at `positions` (B, M)."""
    return values.scatter(1, positions[..., None].expand_as(tokens), tokens.to(values.dtype))


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of `values` (B, L, c): (B, K, c)."""
    return _take(values, index, _rows(index, values.shape[1]))


def _take(values: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """The same if `rows` are what `_rows` makes of the index."""
    # Whole rows are copied ten times faster than by `gather`, whose index is as large as the result.
    return values.flatten(0, 1).index_select(0, rows).view(*index.shape, values.shape[2])


def nearest(positions: Tensor, wanted: Tensor) -> Tensor:
    """(B, n) index of the token whose position (B, L) is nearest to `wanted` (B, n); of two, the one before it."""
    ascending, index = positions.sort(dim=1)
    last = positions.shape[1] - 1
    after = torch.searchsorted(ascending, wanted.contiguous())
    after = after.clamp(0, last)  # not max alone: a traced size is a tensor on the CPU
    before = (after - 1).clamp(min=0)
    is_before = wanted - ascending.gather(1, before) <= ascending.gather(1, after) - wanted
    return index.gather(1, torch.where(is_before, before, after))


def sum_tokens(values: Tensor, target: Tensor, count: int) -> Tensor:
    """(B, count, c): in each row the sum of the rows of `values` (B, L, c) whose `target` (B, L) it is."""
    rows = _rows(target, count)[:, None].expand(-1, values.shape[2])
    total = values.new_zeros(len(values) * count, values.shape[2])
    return total.scatter_add(0, rows, values.flatten(0, 1)).view(len(values), count, values.shape[2])


def _rows(index: Tensor, length: int) -> Tensor:
    """(B * K,): `index` (B, K) into each of B runs of `length` rows, as an index into all of them in one."""
    return (index + length * torch.arange(len(index), device=index.device)[:, None]).flatten()
