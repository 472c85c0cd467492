"""The block of Vim, VideoMamba, Mamba-Reg and LocalVim: residual stream, norm and mixer. Letters: as in mixer.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import add_rms_norm
from ssmprune_cli.models.common import Block, RMSNorm
from ssmprune_cli.models.mamba.mixer import SequenceMixer
from ssmprune_cli.tokens import Derivation, TokenSequence


class MambaBlock(Block):
    """Add the last output to the residual stream, normalise, mix. The stream is in float32 at least, as upstream."""

    mixer: SequenceMixer

    def __init__(self, norm: nn.LayerNorm | RMSNorm, mixer: SequenceMixer) -> None:
        super().__init__()
        assert isinstance(mixer, nn.Module)
        self.norm = norm
        self.mixer = mixer

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        stream, live, frozen, context = self.normalised(sequence)
        hidden, statistics = self.mixer(live, sequence, alignment, wanted, frozen, context)
        return replace(sequence, hidden=self.drop(hidden), residual=stream), statistics

    def normalised(self, sequence: TokenSequence) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The residual stream (B, L, d); then what the mixer sees: live (B, L, d), frozen and context tokens."""
        if isinstance(self.norm, RMSNorm):
            live, stream = add_rms_norm(sequence.hidden, sequence.residual, self.norm.weight, self.norm.eps)
        else:
            stream = sequence.stream
            live = self.norm(stream.to(self.norm.weight.dtype))
        return stream, live, self._dropped(sequence, "frozen"), self._dropped(sequence, "context")

    def _dropped(self, sequence: TokenSequence, fate: Literal["frozen", "context"]) -> Tensor | None:
        """The normalised tokens of this fate (B, M, d)."""
        dropped, norm = getattr(sequence, fate), self.norm
        if dropped is None:
            return None
        if isinstance(norm, RMSNorm) and not torch.is_grad_enabled():
            return unit_tokens(sequence, fate, norm) * norm.weight
        normalised: Tensor = norm(dropped.stream.to(norm.weight.dtype))
        return normalised


_UNIT = Derivation[Tensor]("unit tokens")


def unit_tokens(sequence: TokenSequence, fate: Literal["frozen", "context"], norm: RMSNorm) -> Tensor:
    """The tokens of this fate (B, M, d) divided by their root mean square. They stay the same until the next drop."""
    dtype = norm.weight.dtype
    return sequence.geometry.once(
        _UNIT, lambda: norm.unit(getattr(sequence, fate).stream.to(dtype)), fate, dtype, norm.eps
    )
