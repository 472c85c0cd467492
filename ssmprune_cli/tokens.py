"""The sequence of tokens that flows through a backbone, and what a mixer and a pruner tell each other about it.

This is all that `models` and `pruning` share. Letters: B batch, L tokens now, E inner channels, d model width.
A token's *position* is its index in the dense sequence. It never changes; gaps and ranks are derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """A run of blocks that see the same grid of tokens. Between two stages is a downsampling of the whole grid.

    start, stop  the first block, and one past the last
    grid         rows and columns of patch tokens
    protected    positions in the dense sequence that may never be dropped (class and register tokens)
    """

    start: int
    stop: int
    grid: tuple[int, int]
    protected: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Length of the dense sequence, protected tokens included."""
        return self.num_patches + len(self.protected)


@dataclass(frozen=True)
class Context:
    """Dropped tokens, as they were when they left.

    stream    (B, M, d) residual stream with the last block's output added
    positions (B, M) int64 index of each token in the dense sequence
    seen      whether convolutions go on seeing them; if not, they wait for `TokenSequence.restored`
    """

    stream: Tensor
    positions: Tensor
    seen: bool


@dataclass(frozen=True)
class TokenSequence:
    """Tokens between two blocks.

    hidden    (B, L, d) output of the last block
    residual  (B, L, d) residual stream, or None before the first block
    positions (B, L) int64 index of each token in the dense sequence; ascending except after `drop-unsorted`
    length    number of tokens in the dense sequence
    protected dense positions that may never be dropped (class and register tokens), the same in every sample
    live      (B, L) bool, or None when every token is live; only the comparison reduction `mask` sets it
    context   dropped tokens as they were when they left, for whoever still needs them
    restorable  whether `restored` will be asked for, in models that make the grid whole again
    memo      what has been derived from the positions, by name: all blocks between two prune points share it
    """

    hidden: Tensor
    residual: Tensor | None
    positions: Tensor
    length: int
    protected: tuple[int, ...] = ()
    live: Tensor | None = None
    context: Context | None = None
    restorable: bool = False
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def dense(cls, hidden: Tensor, protected: tuple[int, ...] = (), *, restorable: bool = False) -> TokenSequence:
        """All tokens of `hidden` (B, L, d), none dropped yet."""
        batch, length = hidden.shape[0], hidden.shape[1]
        positions = torch.arange(length, device=hidden.device).expand(batch, length)
        return cls(hidden, None, positions, length, protected, restorable=restorable)

    @property
    def is_dense(self) -> bool:
        """Whether no token has been dropped. Known from shapes alone, so it is static under export."""
        return self.hidden.shape[1] == self.length

    @property
    def stream(self) -> Tensor:
        """(B, L, d), float32 at least: the residual stream with the last block's output added to it."""
        stream = self.hidden if self.residual is None else self.residual + self.hidden
        return stream.to(torch.promote_types(stream.dtype, torch.float32))

    def keep(self, index: Tensor, *, remember: bool = False) -> TokenSequence:
        """Keep the tokens at `index` (B, K), in that order. The one place where tokens are dropped.

        With `remember`, convolutions go on seeing the others.
        """
        context = self.context
        if remember or self.restorable:
            others = torch.ones_like(self.positions).scatter(1, index, 0)
            others = others.argsort(dim=1, descending=True, stable=True)[:, : self.positions.shape[1] - index.shape[1]]
            stream, positions = gather_tokens(self.stream, others), self.positions.gather(1, others)
            if context is not None:
                stream = torch.cat((context.stream, stream), dim=1)
                positions = torch.cat((context.positions, positions), dim=1)
            context = Context(stream, positions, seen=remember)
        return replace(
            self,
            hidden=gather_tokens(self.hidden, index),
            residual=None if self.residual is None else gather_tokens(self.residual, index),
            context=context,
            positions=self.positions.gather(1, index),
            live=None if self.live is None else self.live.gather(1, index),
            memo={},
        )

    def restored(self) -> Tensor:
        """(B, length, d): the dense sequence, dropped tokens as they were when they left. For `restorable` sequences.

        The reduction `mask` drops nothing, so its zeroed tokens stay what they are.
        """
        if self.context is None:
            return self.hidden
        values = torch.cat((self.hidden, self.context.stream.to(self.hidden.dtype)), dim=1)  # (B, length, d)
        order = torch.cat((self.positions, self.context.positions), dim=1).argsort(dim=1)
        return gather_tokens(values, order)

    def is_protected(self) -> Tensor:
        """(B, L) bool: which tokens may not be dropped."""
        mask = torch.zeros_like(self.positions, dtype=torch.bool)
        for position in self.protected:
            mask = mask | (self.positions == position)
        return mask

    def at(self, values: Tensor, position: int) -> Tensor:
        """The row of `values` (B, L, c) that belongs to the protected dense `position`: (B, c)."""
        if self.is_dense:
            return values[:, position]
        rank = (self.positions == position).int().argmax(dim=1)  # (B,)
        return values.gather(1, rank[:, None, None].expand(-1, 1, values.shape[-1]))[:, 0]

    def mean(self, values: Tensor) -> Tensor:
        """Mean of `values` (B, L, c) over the live tokens: (B, c)."""
        if self.live is None:
            return values.mean(dim=1)
        weight = self.live.to(values.dtype)[..., None]  # (B, L, 1)
        return (values * weight).sum(dim=1) / weight.sum(dim=1)

    def gaps(self, *, reverse: bool) -> Tensor:
        """(B, L) float32: how many dropped tokens a raster scan skips just before each token.

        In a reverse scan "before" is the side of higher positions. The first token of a scan gets 0: the state is still
        zero there, so what was skipped cannot matter.
        """
        key = "gaps in reverse" if reverse else "gaps"
        if key not in self.memo:
            self.memo[key] = self._gaps(reverse)
        gaps: Tensor = self.memo[key]
        return gaps

    def _gaps(self, reverse: bool) -> Tensor:
        skipped = (self.positions[:, 1:] - self.positions[:, :-1] - 1).float()  # (B, L-1)
        zero = torch.zeros_like(skipped[:, :1]) if skipped.shape[1] else skipped.new_zeros(len(skipped), 1)
        return torch.cat((skipped, zero), dim=1) if reverse else torch.cat((zero, skipped), dim=1)


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (B, K) of `values` (B, L, c): (B, K, c)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


@dataclass(frozen=True)
class ScanStatistics:
    """What one mixer hands out about its scans: one entry a direction, brought back to the tokens' own positions.

    y      (B, L, E) scan outputs with the D skip, before the gate
    delta  (B, L, E) step sizes after softplus; empty unless the pruner asked for them
    """

    y: tuple[Tensor, ...]
    delta: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ScanAlignment:
    """How the scans of one layer step over dropped tokens: h decays by exp(A * gap * gap_delta) before the next one.

    gap_delta has one entry for each direction: (E,) the step of a dropped token per channel, or None to use the next
    kept token's own step ("neighbour").
    """

    gap_delta: tuple[Tensor | None, ...]


class Pruner(Protocol):
    """The slot `model.pruner`: asked once before and once after every block (blocks count from 0).

    An implementation is an nn.Module, so that its buffers are saved and moved with the model.
    """

    def wants_delta(self, block: int) -> bool:
        """Whether the mixer of `block` should hand out its step sizes too."""
        ...

    def alignment(self, block: int) -> ScanAlignment | None:
        """How the scans of `block` step over dropped tokens; None for not at all. Asked when tokens are missing."""
        ...

    def __call__(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        """The tokens that go on after `block`."""
        ...


class Mixer(Protocol):
    """What pruning and counting need to know of a mixer.

    per_direction  names of its child modules whose work is repeated for every scan direction, the scan itself left out;
                   together they do the same work for each. What directions share is not among them
    """

    d_inner: int
    directions: int
    per_direction: tuple[str, ...]

    def null_delta(self) -> Tensor:
        """(directions, E): the step size of a zero token among zero tokens, from the weights alone."""
        ...


Mixers = Sequence[Mixer]
