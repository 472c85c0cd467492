"""The weights that the inside of a Mamba block multiplies matrices with, as the kernels in Triton read them.

Glossary: as in inputs.py; R' and N' are R and 2N, rounded up to a power of two of at least 16, the least that a
product on a GPU's matrix units takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.kernels.packing import EightBit, InnerParameters

LEAST = 16  # columns


def padded(columns: int) -> int:
    """The power of two that takes so many columns."""
    return max(LEAST, 1 << max(columns - 1, 0).bit_length())


def pack_products(directions: Sequence[InnerParameters], dtype: torch.dtype) -> Tensor:
    """The weights of the products of all directions as `mamba_inner` takes them beside `pack_inner`'s: (G, n), `dtype`.

    Of each direction x_weight (E, R' + N'), first its outputs for the step, then those for B and C, and dt_weight
    (R', E); what pads them is zero.
    """
    return torch.stack([_direction(own, dtype) for own in directions])


def products_size(d_inner: int, d_state: int, dt_rank: int) -> int:
    """Values that `pack_products` gives for one direction."""
    return d_inner * (2 * padded(dt_rank) + padded(2 * d_state))


class Products(NamedTuple):
    """One direction's weights, as views of what `pack_products` gives."""

    x_weight: Tensor  # (R' + N', E)
    dt_weight: Tensor  # (E, R)

    def project(self, u: Tensor, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of u (B, S, E) the low-rank step (B, S, R), B and C (B, S, N)."""
        rank = self.dt_weight.shape[1]
        rank_values, both = functional.linear(u, self.x_weight).tensor_split([padded(rank)], dim=-1)
        return rank_values[..., :rank], both[..., :d_state], both[..., d_state : 2 * d_state]


def unpack_products(packed: Tensor, d_inner: int, d_state: int, dt_rank: int) -> Products:
    """Of one direction's row of what `pack_products` gives."""
    rank, columns = padded(dt_rank), padded(dt_rank) + padded(2 * d_state)
    x_weight, dt_weight = packed.split([d_inner * columns, rank * d_inner])
    return Products(x_weight.view(d_inner, columns).t(), dt_weight.view(rank, d_inner)[:dt_rank].t())


def _direction(own: InnerParameters, dtype: torch.dtype) -> Tensor:
    assert not isinstance(own.x_weight, EightBit)
    rank = own.dt_weight.shape[1]
    step, both = own.x_weight[:rank].t(), own.x_weight[rank:].t()  # (E, R), (E, 2N)
    parts = [functional.pad(each, (0, padded(each.shape[1]) - each.shape[1])) for each in (step, both)]
    dt_weight = functional.pad(own.dt_weight, (0, padded(rank) - rank)).t()  # (R', E)
    return torch.cat([each.to(dtype).flatten() for each in (torch.cat(parts, dim=1), dt_weight)])
