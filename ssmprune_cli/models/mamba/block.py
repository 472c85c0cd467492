"""The block of Vim, VideoMamba and Mamba-Reg: residual stream, norm and Mamba mixer. Letters: as in mamba_mixer.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import BlockSizes, add_rms_norm
from ssmprune_cli.models.common import Block, RMSNorm, is_plain
from ssmprune_cli.models.mamba.fused import packed_block
from ssmprune_cli.models.mamba.mixer import MambaMixer
from ssmprune_cli.tokens import TokenSequence


class MambaBlock(Block):
    """Add the last output to the residual stream, normalise, mix. The stream is in float32 at least, as upstream."""

    def __init__(self, norm: nn.LayerNorm | RMSNorm, mixer: MambaMixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def packed(self, parts: int) -> Tensor | None:
        """The parameters as `fused_blocks` takes them, with weights in `parts`; None if the block is not made of
        what that computes, or has weights that were made in inference mode, whose changes nobody notices."""
        norm, mixer = self.norm, self.mixer
        plain = is_plain(self, MambaBlock) and is_plain(norm, RMSNorm) and is_plain(mixer, MambaMixer)
        plain = plain and is_plain(mixer.in_proj, nn.Linear) and is_plain(mixer.out_proj, nn.Linear)
        inner = mixer.inner_parameters() if plain else None
        if inner is None or any(parameter.is_inference() for parameter in self.parameters()):
            return None
        scale = () if mixer.gamma is None else (mixer.gamma,)
        return packed_block(parts, norm.weight, mixer.in_proj.weight, mixer.out_proj.weight, *inner, *scale)

    def run(
        self, sequence: TokenSequence, alignment: ScanAlignment | None, wanted: Wanted
    ) -> tuple[TokenSequence, ScanStatistics]:
        if isinstance(self.norm, RMSNorm):
            normalised, stream = add_rms_norm(sequence.hidden, sequence.residual, self.norm.weight, self.norm.eps)
        else:
            stream = sequence.stream
            normalised = self.norm(stream.to(self.norm.weight.dtype))
        frozen, context = self._dropped(sequence, "frozen"), self._dropped(sequence, "context")
        hidden, statistics = self.mixer(normalised, sequence, alignment, wanted, frozen, context)
        return replace(sequence, hidden=self.drop(hidden), residual=stream), statistics

    def _dropped(self, sequence: TokenSequence, fate: Literal["frozen", "context"]) -> Tensor | None:
        """The normalised tokens of this fate (B, M, d)."""
        dropped, norm = getattr(sequence, fate), self.norm
        if dropped is None:
            return None
        if isinstance(norm, RMSNorm) and not torch.is_grad_enabled():
            return unit_tokens(sequence, fate, norm) * norm.weight
        normalised: Tensor = norm(dropped.stream.to(norm.weight.dtype))
        return normalised


class PackedBlocks(NamedTuple):
    """What `fused_blocks` takes of a list's blocks.

    parameters         (n, size), of each plain block
    plain              for each block, whether it is one: made of what the op computes, and like the first that is
    sizes, scale, eps  of all plain blocks
    """

    parameters: Tensor
    plain: list[bool]
    sizes: BlockSizes
    scale: float
    eps: float

    def run(self, start: int, stop: int) -> Tensor:
        """Those of the blocks from `start` to `stop`, all of them plain."""
        first = sum(self.plain[:start])
        return self.parameters[first : first + stop - start]


def packed_blocks(layers: nn.Module, parts: int) -> PackedBlocks | None:
    """Of the blocks in a list of modules, with weights in `parts`; None if no block is plain."""
    found, plain, like = [], [], None
    for block in layers.children():
        packed = block.packed(parts) if isinstance(block, MambaBlock) else None
        own = None
        if isinstance(block, MambaBlock) and packed is not None:
            own = (packed.shape, block.mixer.sizes, block.mixer.scale, block.norm.eps)
            like = like or own
        plain.append(own is not None and own == like)
        if packed is not None and plain[-1]:
            found.append(packed)
    if like is None:
        return None
    _, sizes, scale, eps = like
    return PackedBlocks(torch.stack(found), plain, sizes._replace(parts=parts), scale, eps)


def unit_tokens(sequence: TokenSequence, fate: Literal["frozen", "context"], norm: RMSNorm) -> Tensor:
    """The tokens of this fate (B, M, d) divided by their root mean square. They stay the same until the next drop."""
    key = f"unit {fate} {norm.weight.dtype}"
    if key not in sequence.memo:
        sequence.memo[key] = norm.unit(getattr(sequence, fate).stream.to(norm.weight.dtype))
    unit: Tensor = sequence.memo[key]
    return unit
