"""Mamba blocks by the fused ops, `kernels.mamba_inner` and `kernels.mamba_blocks`. Letters as there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import BlockSizes, InnerParameters, mamba_blocks, mamba_inner, pack_block, pack_inner
from ssmprune_cli.models.common import decay_rates
from ssmprune_cli.models.mamba.causal_sources import conv_sources
from ssmprune_cli.tokens import TokenSequence

_EACH = 7  # parameters of one direction


def packed_inner(*parameters: Tensor) -> Tensor:
    """For `mamba_inner`, of each direction in turn: the weights of conv1d (E, 1, K), x_proj and dt_proj, A_log, the
    biases of conv1d and dt_proj, and D."""
    return pack_inner(_directions(parameters))


def packed_block(parts: int, norm: Tensor, in_proj: Tensor, out_proj: Tensor, *others: Tensor) -> Tensor:
    """For `mamba_blocks`, with weights in `parts`: the weights of norm and projections, what `packed_inner` takes,
    and the layer scale (d,) if there is one."""
    if len(others) % _EACH:
        *others, gamma = others  # type: ignore[assignment]
        out_proj = out_proj * gamma[:, None]
    return pack_block(norm, in_proj, out_proj, _directions(others), parts)


def _directions(parameters: Sequence[Tensor]) -> list[InnerParameters]:
    directions = []
    for first in range(0, len(parameters), _EACH):
        conv_weight, x_weight, dt_weight, A_log, *vectors = parameters[first : first + _EACH]
        directions.append(InnerParameters(conv_weight[:, 0], x_weight, dt_weight, decay_rates(A_log), *vectors))
    return directions


def fused_inner(
    sequence: TokenSequence,
    xz: Tensor,
    parameters: Tensor,
    sizes: BlockSizes,
    alignment: ScanAlignment | None,
    context: Tensor | None,
    scale: float,
) -> Tensor:
    """The inside of a block, (B, L, E): of xz (B, L, 2E), the projected tokens, and its context (B, M, E)."""
    return mamba_inner(
        xz,
        parameters,
        sizes.d_state,
        sizes.d_conv,
        sizes.dt_rank,
        gap=None if alignment is None else sequence.both_gaps()[: sizes.directions],
        gap_delta=None if alignment is None else alignment.gap_delta,
        context=context,
        sources=None if context is None else conv_sources(sequence, sizes.d_conv)[: sizes.directions],
        scale=scale,
    )


def fused_blocks(
    sequence: TokenSequence,
    parameters: Tensor,
    sizes: BlockSizes,
    alignments: Sequence[ScanAlignment | None],
    context: Tensor | None,
    scale: float,
    eps: float,
    wanted: Wanted,
) -> tuple[TokenSequence, ScanStatistics]:
    """`sequence` after several blocks, and the last one's statistics, of which delta cannot be wanted.

    `context` (B, M, d) are its context's tokens, of root mean square 1.
    """
    steps = [each.gap_delta for each in alignments if each is not None and each.gap_delta is not None]
    hidden, residual, y = mamba_blocks(
        sequence.hidden,
        sequence.residual,
        parameters,
        sizes,
        gap=None if alignments[0] is None else sequence.both_gaps()[: sizes.directions],
        gap_delta=torch.stack(steps) if steps else None,
        context=context,
        sources=None if context is None else conv_sources(sequence, sizes.d_conv)[: sizes.directions],
        scale=scale,
        eps=eps,
        wants_y=wanted == "y",
    )
    return replace(sequence, hidden=hidden, residual=residual), ScanStatistics((y,) if wanted == "y" else ())
