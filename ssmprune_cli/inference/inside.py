"""The inside of a Mamba block in one call, on any device: what stands in its way, what it takes, and the mixer.

Letters: B batch, L tokens now, F frozen tokens, M tokens that only convolutions see, d model width, E inner channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import first_unlike
from ssmprune_cli.inference.copying import as_kind
from ssmprune_cli.inference.explain import BY_OP, Journal
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import InnerParameters, Weight, mamba_inner, pack_inner
from ssmprune_cli.models import (
    BranchMixer,
    CausalConv1d,
    EightBitLinear,
    LocalMixer,
    MambaMixer,
    StepProjection,
    conv_sources,
    decay_rates,
    inflow,
)
from ssmprune_cli.tokens import Derivation, TokenSequence

INSIDE = "the inside of each block in one call"


def inside_refused(mixer: nn.Module, *, whole: bool = False) -> str | None:
    """Why `mamba_inner`, or with `whole` `mamba_blocks`, cannot stand for the inside of `mixer`; None if it can."""
    reason = first_unlike((mixer, LocalMixer if isinstance(mixer, LocalMixer) else MambaMixer))
    if reason is not None or not isinstance(mixer, BranchMixer):
        return reason
    if isinstance(mixer, MambaMixer) and mixer.kind == "v1":
        return "its directions share a convolution"
    for branch in mixer.branches():
        x_proj: nn.Module = branch.x_proj
        projection = EightBitLinear if whole and isinstance(x_proj, EightBitLinear) else nn.Linear
        reason = first_unlike((branch.conv1d, CausalConv1d), (x_proj, projection), (branch.dt_proj, StepProjection))
        if reason is not None:
            return reason
    return None


_ENDS = Derivation[Tensor]("ends of cells")


def lost_tokens(
    sequence: TokenSequence, alignments: Sequence[ScanAlignment | None], directions: int, width: int
) -> dict[str, Tensor]:
    """What `sequence` has lost and what goes on feeding its scans, but for the values of those tokens, as
    `mamba_blocks` takes it for blocks with these `alignments` of one kind."""
    frozen, lost = sequence.frozen, dict[str, Tensor]()
    # The rules are those of the small ops. No values: only what is derived from positions is used.
    nothing = None if frozen is None else frozen.stream[..., :0]
    flow = inflow(sequence, sequence.hidden[..., :0], nothing, alignments[0])
    if flow.alignment is not None:
        steps = [each.gap_delta for each in alignments if each is not None and each.gap_delta is not None]
        masses = [each.mass.float() for each in alignments if each is not None and each.mass is not None]
        if not masses:
            lost["gap"] = flow.scanned.both_gaps()[:directions]
        elif flow.size is not None:
            lost |= {"size": flow.size, "mass": _stacked(masses)}
        if steps:
            lost["gap_delta"] = _stacked(steps)
    cells = flow.cells
    if cells is not None:
        size = cells.size
        lost |= {"read": cells.live, "cells": sequence.geometry.once(_ENDS, lambda: size.cumsum(dim=1).long())}
        if "size" not in lost:  # all of a cell is put into the state, and nothing decays for it
            lost |= {"size": size, "mass": size.new_ones(len(alignments))}
            lost.setdefault("gap", torch.zeros_like(size).expand(directions, -1, -1))
    elif flow.read is not None:
        lost["read"] = flow.read
    if frozen is not None or sequence.context is not None:
        lost["sources"] = conv_sources(sequence, width)[:directions]
    return lost


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One beside the other; of one a view, which starts nothing on a GPU."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def weight_of(layer: nn.Linear | EightBitLinear) -> Weight:
    return layer.eight_bit if isinstance(layer, EightBitLinear) else layer.weight


def directions_of(mixer: BranchMixer) -> list[InnerParameters]:
    """The parameters of the inside of `mixer`, direction by direction."""
    return [
        InnerParameters(
            branch.conv1d.weight[:, 0],
            weight_of(branch.x_proj),
            branch.dt_proj.weight,
            decay_rates(branch.A_log),
            branch.conv1d.bias,
            branch.dt_proj.bias,
            branch.D,
        )
        for branch in mixer.branches()
    ]


class FusedMambaMixer(MambaMixer):
    """A mixer whose inside is one call of `mamba_inner`, where nothing looks at its scans."""

    block: int
    journal: Journal
    why: str

    @classmethod
    def of(cls, mixer: MambaMixer, block: int, journal: Journal, why: str) -> FusedMambaMixer:
        """`why`: what stands in the way of computing the whole block in one call."""
        return as_kind(mixer, cls, block=block, journal=journal, why=why)

    @property
    def products(self) -> Tensor | None:
        """What `mamba_inner` takes of this name: the C code reads the weights as `packed` has them."""
        return None

    @cached_property
    def packed(self) -> Tensor:
        """The parameters as the op takes them, made when first needed: in blocks of one call they never are."""
        return pack_inner(directions_of(self))

    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        if wanted not in ("nothing", "tokens"):
            self.journal.write(self.block, self.block, BY_OP, "the pruner looks at its scans")
            return super().mix(xz, sequence, alignment, wanted, frozen, context)
        self.journal.write(self.block, self.block, INSIDE, self.why)
        return mamba_inner(**self.arguments(xz, sequence, alignment, frozen, context)), ScanStatistics()

    def arguments(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> dict[str, Any]:
        """What `mamba_inner` takes, by name."""
        return {
            "xz": xz,
            "parameters": self.packed,
            "d_state": self.d_state,
            "d_conv": self.d_conv,
            "dt_rank": self.splits[0],
            "context": together(frozen, context),
            "scale": self.scale,
            "products": self.products,
            **of_one(lost_tokens(sequence, [alignment], self.directions, self.d_conv)),
        }


def of_one(lost: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `lost_tokens` gives for a list of one block, as `mamba_inner` takes it."""
    return lost | {name: lost[name][0] for name in ("gap_delta", "mass") if name in lost}


def together(frozen: Tensor | None, context: Tensor | None) -> Tensor | None:
    if frozen is None or context is None:
        return context if frozen is None else frozen
    return torch.cat((frozen, context), dim=1)
