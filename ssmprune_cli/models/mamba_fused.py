"""The inside of a Mamba block as one op, `kernels.mamba_inner`. Letters as there; G scan directions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmprune_cli.interface import ScanAlignment
from ssmprune_cli.kernels import InnerParameters, mamba_inner, pack_inner
from ssmprune_cli.models.causal_sources import conv_sources
from ssmprune_cli.models.layers import decay_rates
from ssmprune_cli.tokens import TokenSequence


def packed(*parameters: Tensor) -> Tensor:
    """For `mamba_inner`, of each direction in turn: conv1d's weight (E, 1, K), x_proj's weight, dt_proj's weight, A_log,
    and the biases of conv1d and dt_proj, and D."""
    each = []
    for first in range(0, len(parameters), 7):
        conv_weight, x_weight, dt_weight, A_log, *vectors = parameters[first : first + 7]
        each.append(InnerParameters(conv_weight[:, 0], x_weight, dt_weight, decay_rates(A_log), *vectors))
    return pack_inner(each)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing but `kind` itself happens when `module` is called: no adapter, no quantised layer, no hook."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def fused_inner(
    sequence: TokenSequence,
    xz: Tensor,
    parameters: Tensor,
    sizes: tuple[int, int, int],
    alignment: ScanAlignment | None,
    context: Tensor | None,
    scale: float,
) -> Tensor:
    """`mamba_inner` of the projected tokens xz (B, L, 2E) of `sequence`, and of its context (B, M, E).

    parameters, sizes  from `packed`, and the d_state, d_conv and dt_rank of them
    """
    directions = len(parameters)
    gap, gap_delta, sources = None, None, None
    if alignment is not None:
        gap = _of_directions(sequence, "all gaps", [sequence.gaps(reverse=g == 1) for g in range(directions)])
        steps = [step for step in alignment.gap_delta if step is not None]
        gap_delta = torch.stack(steps) if steps else None
    if context is not None:
        each = [conv_sources(sequence, sizes[1], reverse=g == 1) for g in range(directions)]
        sources = _of_directions(sequence, f"all sources {sizes[1]}", each)
    return mamba_inner(
        xz, parameters, *sizes, gap=gap, gap_delta=gap_delta, context=context, sources=sources, scale=scale
    )


def _of_directions(sequence: TokenSequence, name: str, each: list[Tensor]) -> Tensor:
    """The tensors of all directions in one, made once for the positions of `sequence`."""
    if name not in sequence.memo:
        sequence.memo[name] = torch.stack(each)
    together: Tensor = sequence.memo[name]
    return together
