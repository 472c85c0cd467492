"""The weights that the inside of a Mamba block multiplies matrices with, as the kernels in Triton read them.

Glossary: as in inputs.py; R' and N' are R and 2N, rounded up to a power of two of at least 16, the least that a
product on a GPU's matrix units takes.
"""

from __future__ import annotations

from collections.abc import Sequence

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

    Of each direction the rows of x_weight for the step, (E, R'), those for B and C, (E, N'), and dt_weight, (R', E);
    what pads them is zero.
    """
    return torch.stack([_direction(own, dtype) for own in directions])


def products_size(d_inner: int, d_state: int, dt_rank: int) -> int:
    """Values that `pack_products` gives for one direction."""
    return d_inner * (2 * padded(dt_rank) + padded(2 * d_state))


def unpack_products(packed: Tensor, d_inner: int, d_state: int, dt_rank: int) -> tuple[Tensor, Tensor]:
    """x_weight (R + 2N, E) and dt_weight (E, R) of one direction's row of what `pack_products` gives."""
    rank, states = padded(dt_rank), padded(2 * d_state)
    step, both, dt_weight = packed.split([d_inner * rank, d_inner * states, rank * d_inner])
    rows = (step.view(d_inner, rank)[:, :dt_rank], both.view(d_inner, states)[:, : 2 * d_state])
    return torch.cat(rows, dim=1).t(), dt_weight.view(rank, d_inner)[:dt_rank].t()


def _direction(own: InnerParameters, dtype: torch.dtype) -> Tensor:
    assert not isinstance(own.x_weight, EightBit)
    rank = own.dt_weight.shape[1]
    step, both = own.x_weight[:rank].t(), own.x_weight[rank:].t()  # (E, R), (E, 2N)
    parts = [functional.pad(each, (0, padded(each.shape[1]) - each.shape[1])) for each in (step, both)]
    dt_weight = functional.pad(own.dt_weight, (0, padded(rank) - rank)).t()  # (R', E)
    return torch.cat([each.to(dtype).flatten() for each in (*parts, dt_weight)])
