"""The sequence of tokens that flows through a backbone.

With `interface.py` this is all that `models` and `pruning` share. Letters: B batch, L tokens now, d model width.
A token's *position* is its index in the dense sequence. It never changes; gaps and ranks are derived from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.grids import Grid, Merged, Pairs, gaps_by_size, patch_positions, protected_positions


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

    @classmethod
    def of_gaps(cls, gaps: Tensor) -> Geometry:
        """Of tokens whose `both_gaps` are known."""
        return cls({(_GAPS,): gaps})


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
_DENSE_POSITIONS = Derivation[Tensor]("positions in the dense sequence")


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
    returning  share of the token here that is nearest in position in a dropped one that comes back; None: it comes back
              as it left
    grid      rows and columns of patch tokens that the positions count; None: they are one row
    merged    what became of the dense grid, after `merge_neighbours`. The sequence is a whole grid again, and `length`,
              `positions`, `protected` and `grid` are those of this smaller one
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
    returning: Tensor | float | None = None
    grid: Grid | None = None
    merged: Merged | None = None
    readout: Readout | None = None
    # A function, since torch.compile (2.13) cannot call the class from here.
    geometry: Geometry = field(default_factory=lambda: Geometry(), compare=False, repr=False)

    @classmethod
    def dense(
        cls,
        hidden: Tensor,
        protected: tuple[int, ...] = (),
        *,
        grid: Grid | None = None,
        restorable: bool = False,
        readout: Readout | None = None,
    ) -> TokenSequence:
        """All tokens of `hidden` (B, L, d), none dropped yet."""
        batch, length = hidden.shape[0], hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).expand(batch, length)
        return cls(hidden, None, positions, length, protected, restorable=restorable, grid=grid, readout=readout)

    @property
    def is_dense(self) -> bool:
        """Whether no token of the grid is missing. Known from shapes alone, so it is static under export."""
        return self.positions.shape[1] == self.length

    @property
    def is_untouched(self) -> bool:
        """Whether no token has been dropped or merged: nothing is to be made up for."""
        return self.is_dense and self.merged is None

    @property
    def dense_length(self) -> int:
        """Number of tokens in the dense sequence."""
        return self.length if self.merged is None else math.prod(self.merged.grid) + len(self.merged.protected)

    @property
    def patch_grid(self) -> Grid:
        """Rows and columns of patch tokens."""
        return self.grid or (1, self.length - len(self.protected))

    @property
    def stream(self) -> Tensor:
        """(B, L, d), float32 at least: the residual stream with the last block's output added to it."""
        return _stream(self.hidden, self.residual)

    def keep(self, index: Tensor, *, others: Fate = "gone") -> TokenSequence:
        """Keep the tokens at `index` (B, K), in that order; `others` says what the rest is still good for.

        This, `merge`, `merge_neighbours` and a reduction's `keep_best` are the only places where tokens are dropped.
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
        stays = self.positions.new_zeros(self.positions.shape[0], self.length).scatter(
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

    def patches(self) -> Tensor:
        """(B, rows, columns, d): `stream` of the patch tokens, of which none may be missing."""
        stream, grid = self.stream, self.patch_grid
        if self.protected:
            stream = stream[:, patch_positions(grid, self.protected, stream.device)]
        tokens: Tensor = stream.unflatten(1, grid)
        return tokens

    def merge_neighbours(self, axis: int, first: Tensor, left: int) -> TokenSequence:
        """Make a smaller grid of a whole one: pairs of neighbours become their mean, weighted by size.

        axis   1: neighbours in a row; 0: in a column
        first  (B, lines, m): in each row (column) the first of each of m pairs, which do not overlap
        left   cells that each row (column) then has

        Protected tokens stay as they are; for their places see `protected_positions`.
        """
        grid = self.patch_grid
        pairs = Pairs.of(first, grid[axis], left)
        smaller = (grid[0], left) if axis else (left, grid[1])
        line = torch.arange(grid[1 - axis], device=first.device)[:, None]

        def raster(cells: Tensor, columns: int) -> Tensor:
            """Cells (B, lines, n) as raster places of a grid with so many columns."""
            return line * columns + cells if axis else cells * columns + line

        def in_order(values: Tensor) -> Tensor:
            """Values (B, lines, n) in raster order."""
            return (values if axis else values.transpose(1, 2)).flatten(1)

        into = in_order(raster(pairs.into, smaller[1]))
        merged = Merged(grid, self.protected, into) if self.merged is None else self.merged.moved(into)
        protected = protected_positions(merged.protected, merged.grid, smaller)
        near, far = (in_order(raster(each, grid[1])) for each in (pairs.near, pairs.far))  # (B, count)
        if self.protected:
            places = patch_positions(grid, self.protected, first.device)
            own = torch.tensor(self.protected, device=first.device).expand(first.shape[0], -1)
            taken = torch.tensor(protected, device=first.device)
            order = torch.cat((patch_positions(smaller, protected, first.device), taken)).argsort()
            near, far = (torch.cat((places[each], own), dim=1)[:, order] for each in (near, far))
        one, other = self.sizes().gather(1, near), self.sizes().gather(1, far) * (far != near)
        size = one + other

        def mean(values: Tensor) -> Tensor:
            exact = torch.promote_types(values.dtype, torch.float32)
            share = (other.to(exact) / size).to(values.dtype)[..., None]  # of a token alone exactly 0
            return torch.lerp(gather_tokens(values, near), gather_tokens(values, far), share)

        length = math.prod(smaller) + len(protected)
        positions = torch.arange(length, device=first.device).expand(near.shape[0], -1)
        return replace(
            self,
            hidden=mean(self.hidden),
            residual=None if self.residual is None else mean(self.residual),
            positions=positions,
            length=length,
            protected=protected,
            size=size,
            grid=smaller,
            merged=merged,
            geometry=Geometry(),
        )

    def spread(self, values: Tensor) -> Tensor:
        """`values` (B, L, c) of a whole grid at every place of the dense one, (B, rows * columns, c): those of the
        token that took it in. For sequences without protected tokens."""
        return values if self.merged is None else gather_tokens(values, self.merged.owner)

    def dense_positions(self) -> Tensor:
        """(B, L) position of each token in the dense sequence; of merged ones see `Merged.dense_positions`."""
        merged = self.merged
        if merged is None:
            return self.positions

        def compute() -> Tensor:
            patches = merged.dense_positions(self.length - len(self.protected))
            if not self.protected:
                return patches
            kept = torch.tensor(merged.protected, device=patches.device).expand(patches.shape[0], -1)
            return torch.cat((patches, kept), dim=1).sort(dim=1).values

        return self.geometry.once(_DENSE_POSITIONS, compute)

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

    def restored(self) -> TokenSequence:
        """The whole grid, with nothing dropped: for `restorable` ones, and as `returning` says.

        The reduction `mask` drops nothing, so its zeroed tokens stay what they are. A merged grid is whole as it is.
        """
        if self.merged is not None:
            return self
        groups = [each for each in (self.frozen, self.context, self.gone) if each is not None]
        if not groups:
            return self._whole(self.hidden)
        values = self.hidden.new_empty(self.hidden.shape[0], self.length, self.hidden.shape[2])
        for group in groups:
            came = group.stream
            if self.returning is not None:
                near = gather_tokens(self.hidden, nearest(self.positions, group.positions))
                came = torch.lerp(came, near.to(came.dtype), self.returning)
            values = _put(values, group.positions, came)
        return self._whole(_put(values, self.positions, self.hidden))

    def _whole(self, hidden: Tensor) -> TokenSequence:
        return TokenSequence.dense(hidden, self.protected, grid=self.grid, readout=self.readout)

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
        """(B, L) float32: how many dropped tokens a raster scan skips just before each token; see `gaps_by_size` for
        tokens of a smaller grid.

        In a reverse scan "before" is the side of higher positions. The first token of a scan gets 0: the state is still
        zero there, so what was skipped cannot matter.
        """
        return self.both_gaps()[int(reverse)]

    def both_gaps(self) -> Tensor:
        """(2, B, L): `gaps` of a scan and of one in reverse."""

        def compute() -> Tensor:
            if self.merged is not None:
                ahead = gaps_by_size(self.sizes())
                return torch.stack((ahead, torch.cat((ahead[:, 1:], torch.zeros_like(ahead[:, :1])), dim=1)))
            return position_gaps(self.positions)

        return self.geometry.once(_GAPS, compute)


def position_gaps(positions: Tensor) -> Tensor:
    """(2, B, L) float32: how many positions lie between those (B, L) of a token and of the one before it; then likewise
    in reverse. 0 for the first."""
    skipped = (positions[:, 1:] - positions[:, :-1] - 1).float()  # (B, L - 1)
    zero = skipped.new_zeros(skipped.shape[0], 1)
    return torch.stack((torch.cat((zero, skipped), dim=1), torch.cat((skipped, zero), dim=1)))


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
    total = values.new_zeros(values.shape[0] * count, values.shape[2])
    return total.scatter_add(0, rows, values.flatten(0, 1)).view(values.shape[0], count, values.shape[2])


def _rows(index: Tensor, length: int) -> Tensor:
    """(B * K,): `index` (B, K) into each of B runs of `length` rows, as an index into all of them in one."""
    return (index + length * torch.arange(index.shape[0], device=index.device)[:, None]).flatten()
