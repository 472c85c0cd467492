"""The sequence of tokens that flows through a backbone, and what a mixer and a pruner tell each other about it.

This is all that `models` and `pruning` share. Letters: B batch, L tokens now, E inner channels, d model width.
A token's *position* is its index in the dense sequence. It never changes; gaps and ranks are derived from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

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
class TokenSequence:
    """Tokens between two blocks.

    hidden    (B, L, d) output of the last block
    residual  (B, L, d) residual stream, or None before the first block
    positions (B, L) int64 index of each token in the dense sequence; ascending except after `drop-unsorted`
    length    number of tokens in the dense sequence
    protected dense positions that may never be dropped (class and register tokens), the same in every sample
    live      (B, L) bool, or None when every token is live; only the comparison reduction `mask` sets it
    restorable  whether `restored` will be asked for, in models that make the grid whole again
    canvas    (B, length, d) in such models: the dense sequence, every dropped token as it was when it left; else None
    """

    hidden: Tensor
    residual: Tensor | None
    positions: Tensor
    length: int
    protected: tuple[int, ...] = ()
    live: Tensor | None = None
    restorable: bool = False
    canvas: Tensor | None = None

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

    def keep(self, index: Tensor) -> TokenSequence:
        """Keep the tokens at `index` (B, K), in that order. The one place where tokens are dropped."""

        def gather(values: Tensor) -> Tensor:
            return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))  # (B, K, d)

        return replace(
            self.remembered(),
            hidden=gather(self.hidden),
            residual=None if self.residual is None else gather(self.residual),
            positions=self.positions.gather(1, index),
            live=None if self.live is None else self.live.gather(1, index),
        )

    def remembered(self) -> TokenSequence:
        """The same tokens, their values now written down for `restored` where a model asks for that."""
        return replace(self, canvas=self.restored()) if self.restorable else self

    def restored(self) -> Tensor:
        """(B, length, d): the dense sequence, tokens that have left (or are not live) as they were when they did.

        For models without a residual stream of its own.
        """
        if self.canvas is None:
            return self.hidden
        index = self.positions[..., None].expand_as(self.hidden)  # (B, L, d)
        values = self.hidden
        if self.live is not None:
            values = values.where(self.live[..., None], self.canvas.gather(1, index))
        return self.canvas.scatter(1, index, values)

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
        skipped = (self.positions[:, 1:] - self.positions[:, :-1] - 1).float()  # (B, L-1)
        zero = torch.zeros_like(skipped[:, :1]) if skipped.shape[1] else skipped.new_zeros(len(skipped), 1)
        return torch.cat((skipped, zero), dim=1) if reverse else torch.cat((zero, skipped), dim=1)


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
