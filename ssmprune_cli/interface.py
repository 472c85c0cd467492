"""What a backbone, its mixers and a pruner tell each other.

Letters: B batch, L tokens now, N state, E inner channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class Stage:
    """A run of blocks that see the same grid of tokens. Between two stages is a downsampling of the whole grid.

    start, stop  the first block, and one past the last
    grid         rows and columns of patch tokens of the dense model
    protected    positions in the dense sequence that may never be dropped (class and register tokens)
    stride       of the downsampling before it: each side is that of the grid before over this, rounded up
    frames       of a clip that the grid is of, one below the other
    """

    start: int
    stop: int
    grid: tuple[int, int]
    protected: tuple[int, ...] = ()
    stride: int = 1
    frames: int = 1

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_tokens(self) -> int:
        """Length of the dense sequence, protected tokens included."""
        return self.num_patches + len(self.protected)


def placed(inputs: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """What a model is called on, on its device: images in its dtype, numbers of tokens as they are."""
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


# What a pruner wants after a block: nothing at all, or the tokens, or of the ScanStatistics y too, or y and delta too.
Wanted = Literal["nothing", "tokens", "y", "delta"]


def at_least_tokens(wanted: Wanted) -> Wanted:
    """What to want when a pruner inside wants `wanted`, and the one around it looks at the tokens after every block."""
    return "tokens" if wanted == "nothing" else wanted


@dataclass(frozen=True)
class ScanStatistics:
    """What one mixer hands out about its scans: one entry a direction, brought back to the tokens' own positions.

    Either may be empty unless the pruner wants it.

    y      (B, L, E) scan outputs with the D skip, before the gate; or one entry, the sum over directions
    delta  (B, L, E) step sizes after softplus
    """

    y: tuple[Tensor, ...] = ()
    delta: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ScanAlignment:
    """How the scans of one layer make up for dropped tokens.

    gap_delta  (directions, E): the step of a dropped token; h decays by exp(A * gap * gap_delta) before the next kept
               one. None is the next kept token's own step ("neighbour")
    mass       () or None: instead, the step of a token that stands for `size` tokens grows by the factor
               1 + mass (size - 1), in its decay and in what it puts into the state
    """

    gap_delta: Tensor | None = None
    mass: Tensor | None = None

    def like(self, tokens: Tensor) -> ScanAlignment:
        """The same on the device of `tokens`, and in their dtype if that is float32 or more."""
        if self.gap_delta is None:
            return self
        exact = torch.promote_types(tokens.dtype, torch.float32)
        return replace(self, gap_delta=self.gap_delta.to(tokens.device, exact))

    def steps(
        self, direction: int, gap: Tensor | None, size: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the scan of `direction` is given as gap (B, L) and gap_delta (E,), and the growth (B, L) of its steps.

        `gap` and `size` (B, L) are of the tokens in the order in which the scan is given them.
        """
        if self.mass is None:
            return gap, None if gap is None or self.gap_delta is None else self.gap_delta[direction], None
        if size is None:
            return None, None, None
        growth = self.mass.float() * (size - 1)
        return growth, None, growth


class Pruner(Protocol):
    """The slot `model.pruner`: asked before every block, and called after each that it wants (blocks count from 0).

    An implementation inherits this after nn.Module, so that its buffers are saved and moved with the model; there,
    `forward` is what is called.
    """

    def wants(self, block: int) -> Wanted:
        """What it is to be given after `block`. With "nothing" it is not called: the block may be one of several that
        are computed at once."""
        ...

    def alignment(self, block: int) -> ScanAlignment | None:
        """How the scans of `block` make up for dropped tokens; None for not at all. Asked when tokens are missing."""
        ...

    def __call__(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        """The tokens that go on after `block`."""
        ...


class Mixer(Protocol):
    """What pruning and counting need to know of a mixer. An implementation inherits this after nn.Module.

    d_model        width of the tokens; `d_inner` that of the scans
    per_direction  names of its inner modules whose work every scan direction repeats, the scan itself left out, each
                   one that is called; together they do the same work for each. What directions share is not among them
    """

    d_model: int
    d_inner: int
    directions: int
    per_direction: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        """E: how many step sizes a token has in each direction; d_inner, unless channels share them."""
        return self.d_inner

    def null_delta(self) -> Tensor:
        """(directions, E): the step size of a zero token among zero tokens, from the weights alone."""
        ...


Mixers = Sequence[Mixer]
