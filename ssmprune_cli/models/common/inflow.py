"""What flows into the scans of one block: live tokens, frozen ones beside them or pooled into them, and lost ones.

Letters: B batch, L live tokens, F frozen tokens, S tokens that a scan steps over (L, or L + F when frozen tokens have
steps of their own), E inner channels, N state. A *cell* is a live token with the frozen ones that are nearer to it than
to any other; a scan over pooled tokens takes one step for each cell, and what that step puts into the state counts for
all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.kernels import selective_scan
from ssmprune_cli.tokens import Derivation, TokenSequence, gather_tokens, nearest, sum_tokens


@dataclass(frozen=True)
class Cells:
    """The cells of one sequence.

    live   (B, L) row of each live token in the joined sequence
    owner  (B, L + F) the live token, counted among those, to whose cell each token of the joined sequence belongs
    size   (B, L) float32 tokens in each cell
    """

    live: Tensor
    owner: Tensor
    size: Tensor

    def weights(self, mass: Tensor | float, dtype: torch.dtype) -> Tensor:
        """(B, L + F): the part of each token in the mean of its cell; a frozen one counts `mass` times a live one."""
        frozen = torch.ones_like(self.owner, dtype=torch.promote_types(dtype, torch.float32)).scatter(1, self.live, 0.0)
        whole = (1 + mass * (self.size.to(frozen.dtype) - 1)).gather(1, self.owner)
        return ((1 + (mass - 1) * frozen) / whole).to(dtype)


_CELLS = Derivation[Cells]("cells")


@dataclass(frozen=True)
class Inflow:
    """How the tokens of one block reach its convolution and its scans.

    values     (B, L, E), or (B, L + F, E): the projected tokens that the convolution goes over
    convolved  the sequence of those
    scanned    the sequence of the S tokens that the scans step over
    read       (B, L) which of those are read out; None is all
    cells      when frozen tokens are pooled
    weights    (B, L + F) the part of each token in its cell's mean
    """

    values: Tensor
    convolved: TokenSequence
    scanned: TokenSequence
    read: Tensor | None
    alignment: ScanAlignment | None
    cells: Cells | None = None
    weights: Tensor | None = None

    @property
    def size(self) -> Tensor | None:
        """(B, S): how many tokens each step stands for; None is one each."""
        return self.scanned.size if self.cells is None else self.cells.size

    def pool(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of the convolved u (B, L + F, E) what each step sees, (B, S, E): its cell's mean, in which a frozen token
        counts as the alignment's mass says. Then the live tokens' own values, None if they are the same.
        """
        if self.cells is None or self.weights is None:
            return u, None
        mean = sum_tokens(u * self.weights[..., None], self.cells.owner, self.cells.size.shape[1])
        return mean, gather_tokens(u, self.cells.live)

    def scan(
        self,
        direction: int,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        *,
        own: Tensor | None,
        delta_bias: Tensor,
        gap: Tensor | None,
        size: Tensor | None,
        read: Tensor | None,
        reverse: bool = False,
    ) -> Tensor:
        """The scan of one direction, made up for lost tokens: y (B, L, E).

        Everything is in the order in which the scan is given its steps: u, delta (B, S, E), B, C (B, S, N), `own`
        (B, S, E) and `size` (B, S) as `pool` and `size` say, `gap` (B, S) dropped tokens before each step.
        """
        gap, gap_delta, growth = self.steps(direction, own, gap, size)
        if growth is not None:
            B = B * (1 + growth).to(B.dtype)[..., None]  # the input into the state is dt B u
        y = selective_scan(
            u,
            delta,
            A,
            B,
            C,
            D if own is None else None,
            delta_bias=delta_bias,
            gap=gap,
            gap_delta=gap_delta,
            reverse=reverse,
            read=read,
        )
        return y if own is None else torch.addcmul(y, own, D.to(y.dtype))

    def steps(
        self, direction: int, own: Tensor | None, gap: Tensor | None, size: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What makes the scan of `direction` up for lost tokens: gap (B, S) and gap_delta (E,) as it takes them, and by
        how much more than once (B, S) each step's input goes into the state; None for nothing."""
        gap_delta, growth = None, None
        if self.alignment is None:
            gap = None
        else:
            gap, gap_delta, growth = self.alignment.steps(direction, gap, size)
        if own is not None and growth is None and size is not None:
            growth = size - 1
        return gap, gap_delta, growth


def inflow(
    sequence: TokenSequence,
    values: Tensor,
    frozen: Tensor | None,
    alignment: ScanAlignment | None,
    columns: int | None = None,
) -> Inflow:
    """`values` (B, L, E) of the live and `frozen` (B, F, E) of the frozen tokens, projected but not yet convolved.

    columns  of the grid, in models whose scans run over a grid: nearness is then counted in rows and columns
    """
    if frozen is None:
        return Inflow(values, sequence, sequence, None, alignment)
    joined, live = sequence.joined(values, frozen)
    if not sequence.pooled:  # with all tokens there, nothing is to be made up for
        return Inflow(joined.hidden, joined, joined, live, None if joined.is_dense else alignment)
    cells = sequence.geometry.once(_CELLS, lambda: _cells(sequence.positions, joined.positions, live, columns), columns)
    mass = 1.0 if alignment is None or alignment.mass is None else alignment.mass
    return Inflow(joined.hidden, joined, sequence, None, alignment, cells, cells.weights(mass, values.dtype))


def _cells(centres: Tensor, places: Tensor, live: Tensor, columns: int | None) -> Cells:
    """The cells around `centres` (B, L) among `places` (B, L + F). Of two that are as near, the one before owns."""
    if columns is None:
        owner = nearest(centres, places)
    else:
        a, b = places[:, :, None], centres[:, None, :]
        distance = (a // columns - b // columns).abs() + (a % columns - b % columns).abs()  # (B, L + F, L)
        owner = distance.argmin(dim=2)
    ones = torch.ones_like(owner, dtype=torch.float32)
    size = torch.zeros_like(centres, dtype=torch.float32).scatter_add(1, owner, ones)
    return Cells(live, owner, size)
