"""How a mixer goes on token by token: what a prefill leaves behind, and a step from there.

Letters: B batch, L tokens, d model width, C convolved channels, K width of the convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.tokens import TokenSequence


@dataclass(frozen=True)
class MixerState:
    """What a mixer needs of all tokens before the next one.

    conv  (B, K - 1, C) inputs of the convolution, the last one at the end; zeros before the first token
    scan  state of the scan after the last token: (B, E, N) of Mamba-1, (B, heads, P, N) of Mamba-2; float32 at least
    """

    conv: Tensor
    scan: Tensor


class Recurrence(Protocol):
    """One mixer as a recurrence."""

    def prefill(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics, MixerState]:
        """What the mixer computes of these (see `BranchMixer.forward`), and the state that is left."""
        ...

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """One more token: `x` (B, 1, d), normalised, to (B, 1, d)."""
        ...


def last_inputs(values: Tensor, width: int) -> Tensor:
    """(B, width - 1, C): the last inputs of a convolution over `values` (B, L, C), zeros before the first."""
    missing = max(0, width - 1 - values.shape[1])
    return functional.pad(values[:, values.shape[1] - (width - 1 - missing) :], (0, 0, missing, 0))


def convolved(window: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The last output (B, 1, C) of a causal depthwise convolution with SiLU that has seen `window` (B, K, C)."""
    taps = weight[:, 0].t()  # (K, C)
    return functional.silu((window * taps).sum(dim=1, keepdim=True) + bias)


def next_inputs(state: MixerState, value: Tensor) -> Tensor:
    """(B, K, C): the convolution's window with one more `value` (B, 1, C)."""
    return torch.cat((state.conv, value.to(state.conv.dtype)), dim=1)
