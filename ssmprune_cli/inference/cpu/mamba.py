"""Mamba blocks: all between two prune points in one call, or the inside of a block in one, or each of its directions.

Letters: B batch, L tokens now, F frozen tokens, M tokens that only convolutions see, d model width, E inner channels,
G directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import first_unlike
from ssmprune_cli.inference.copying import as_kind
from ssmprune_cli.inference.explain import BY_OP, Journal
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import (
    BlockSizes,
    EightBit,
    InnerParameters,
    Weight,
    mamba_blocks,
    mamba_inner,
    pack_block,
    pack_inner,
    pick,
)
from ssmprune_cli.models import (
    BranchMixer,
    CausalConv1d,
    EightBitLinear,
    LocalMixer,
    MambaBlock,
    MambaMixer,
    MambaSequence,
    RMSNorm,
    StepProjection,
    conv_sources,
    decay_rates,
    inflow,
    scan_path,
    unit_tokens,
)
from ssmprune_cli.tokens import Derivation, TokenSequence

ONE_CALL = "one call"
INSIDE = "the inside of each block in one call"
BRANCHES = "each direction of a block in one call"


def sizes_of(mixer: MambaMixer, parts: int) -> BlockSizes:
    eight_bits = 0
    if isinstance(mixer.in_proj, EightBitLinear):
        eight_bits = 2 if all(isinstance(branch.x_proj, EightBitLinear) for branch in mixer.branches()) else 1
        parts = 0
    return BlockSizes(mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.splits[0], mixer.directions, parts, eight_bits)


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


def _linears_refused(mixer: BranchMixer) -> str | None:
    """Why the linear layers cannot be in one call: they must all be plain ones, or, but for `x_proj`, in eight bits."""
    inside = [branch.x_proj for branch in mixer.branches()]
    if not any(isinstance(each, EightBitLinear) for each in (mixer.in_proj, mixer.out_proj, *inside)):
        return first_unlike((mixer.in_proj, nn.Linear), (mixer.out_proj, nn.Linear))
    reason = first_unlike((mixer.in_proj, EightBitLinear), (mixer.out_proj, EightBitLinear))
    return reason or (
        None if len({type(each) for each in inside}) == 1 else "only some of its directions are in eight bits"
    )


def block_refused(block: nn.Module) -> str | None:
    """Why `mamba_blocks` cannot stand for `block`; None if it can."""
    reason = first_unlike((block, MambaBlock))
    if reason is not None or not isinstance(block, MambaBlock):
        return reason
    if isinstance(block.norm, nn.LayerNorm):
        return "its norm is a LayerNorm"
    mixer: object = block.mixer
    if not isinstance(mixer, BranchMixer):
        return f"a {type(mixer).__name__} in the place of a MambaMixer"
    if isinstance(mixer, LocalMixer):
        return "its directions take routes over the grid"
    reason = first_unlike((block.norm, RMSNorm)) or inside_refused(mixer, whole=True)
    return reason or _linears_refused(mixer)


def _kind(alignment: ScanAlignment | None) -> tuple[bool, ...]:
    """Alignments of one kind can be in one call."""
    return () if alignment is None else (alignment.gap_delta is None, alignment.mass is None)


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


def _weight(layer: nn.Linear | EightBitLinear) -> Weight:
    return layer.eight_bit if isinstance(layer, EightBitLinear) else layer.weight


def directions_of(mixer: BranchMixer) -> list[InnerParameters]:
    """The parameters of the inside of `mixer`, direction by direction."""
    return [
        InnerParameters(
            branch.conv1d.weight[:, 0],
            _weight(branch.x_proj),
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
            "context": _together(frozen, context),
            "scale": self.scale,
            "products": self.products,
            **_of_one(lost_tokens(sequence, [alignment], self.directions, self.d_conv)),
        }


class FusedLocalMixer(LocalMixer):
    """A mixer of which each direction is one call of `mamba_inner`, where nothing looks at its scans."""

    block: int
    journal: Journal
    why: str

    @classmethod
    def of(cls, mixer: LocalMixer, block: int, journal: Journal, why: str) -> FusedLocalMixer:
        """`why`: what stands in the way of computing the whole block in one call."""
        return as_kind(mixer, cls, block=block, journal=journal, why=why)

    @cached_property
    def packed(self) -> Tensor:
        """The parameters of each direction as the op takes them."""
        return torch.stack([pack_inner([branch]) for branch in directions_of(self)])

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
        self.journal.write(self.block, self.block, BRANCHES, self.why)
        outputs = []
        for direction, route in enumerate(self.routes):
            way, own = scan_path(sequence, route), alignment
            if own is not None and own.gap_delta is not None:
                own = replace(own, gap_delta=own.gap_delta[direction : direction + 1])
            output = mamba_inner(
                way.along(xz),
                self.packed[direction],
                self.d_state,
                self.d_conv,
                self.splits[0],
                context=_together(frozen, context),
                scale=1.0,
                **_of_one(lost_tokens(way.sequence, [own], 1, self.d_conv)),
            )
            outputs.append(way.home(output))
        return self.merge(outputs, sequence), ScanStatistics()


def _of_one(lost: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `lost_tokens` gives for a list of one block, as `mamba_inner` takes it."""
    return lost | {name: lost[name][0] for name in ("gap_delta", "mass") if name in lost}


def _together(frozen: Tensor | None, context: Tensor | None) -> Tensor | None:
    if frozen is None or context is None:
        return context if frozen is None else frozen
    return torch.cat((frozen, context), dim=1)


@dataclass(frozen=True)
class PackedBlocks:
    """What `mamba_blocks` takes of the blocks that it can compute.

    parameters  (n, size) float32, of each such block
    rows        of a block's number in `parameters`, for those that are there
    sizes, scale, eps  of all of them
    """

    parameters: Tensor
    rows: dict[int, int]
    sizes: BlockSizes
    scale: float
    eps: float

    def run(self, start: int, stop: int) -> Tensor:
        """Parameters of the blocks from `start` to `stop`, all of which are there."""
        return self.parameters[self.rows[start] : self.rows[stop - 1] + 1]


def pack_blocks(model: MambaSequence) -> tuple[PackedBlocks | None, dict[int, str]]:
    """The blocks of `model` that go into one call, and for every one of the rest the reason why not."""
    reasons: dict[int, str] = {}
    packed: list[Tensor] = []
    rows: dict[int, int] = {}
    like: tuple[BlockSizes, int, float, float] | None = None
    for number, block in enumerate(model.layers):
        reason = block_refused(block)
        if reason is None:
            assert isinstance(block, MambaBlock) and isinstance(block.norm, RMSNorm)
            mixer, dim = block.mixer, block.norm.weight.numel()
            assert isinstance(mixer, MambaMixer)
            weight = block.norm.weight
            parts = pick(weight, mixer.d_state).block_parts(dim, mixer.d_inner, weight.dtype)
            own = (sizes_of(mixer, parts or 0), dim, mixer.scale, block.norm.eps)
            if parts is None:
                reason = f"no kernel for blocks of width {dim} in {weight.dtype}"
            elif like not in (None, own):
                reason = "its sizes, scale or epsilon are not those of the first block"
            else:
                like = own
                rows[number] = len(packed)
                packed.append(_pack(block, own[0].parts))
        if reason is not None:
            reasons[number] = reason
    if like is None:
        return None, reasons
    sizes, _, scale, eps = like
    return PackedBlocks(torch.stack(packed), rows, sizes, scale, eps), reasons


def _pack(block: MambaBlock, parts: int) -> Tensor:
    mixer: object = block.mixer
    assert isinstance(mixer, MambaMixer)
    out_proj = _weight(mixer.out_proj)
    if mixer.gamma is not None and isinstance(out_proj, EightBit):
        out_proj = out_proj._replace(scale=out_proj.scale * mixer.gamma.float())
    elif mixer.gamma is not None and isinstance(out_proj, Tensor):
        out_proj = out_proj * mixer.gamma[:, None]
    return pack_block(block.norm.weight, _weight(mixer.in_proj), out_proj, directions_of(mixer), parts)


def run_features(model: MambaSequence, packed: PackedBlocks, journal: Journal, images: Tensor) -> TokenSequence:
    """`model.features`, with as many blocks in one call as `packed` and the pruner allow."""
    sequence, block = model.embed(images), 0
    while block < len(model.layers):
        turned = model.before_block(sequence)
        if turned is sequence and block in packed.rows:
            run = _run(model, packed, block, sequence, journal)
            if run is not None:
                sequence, block = run
                continue
        alignment, wanted = model.ask_pruner(block, turned)
        sequence, statistics = model.layers[block](turned, alignment, wanted)
        sequence = model.prune(block, sequence, statistics, wanted)
        block += 1
    return sequence


def _run(
    model: MambaSequence, packed: PackedBlocks, block: int, sequence: TokenSequence, journal: Journal
) -> tuple[TokenSequence, int] | None:
    """The sequence after as many blocks as one call can do, from `block` on, and the first of those that are left;
    None if it can do none. The pruner may look at the last one's output, and prune after it."""
    alignments: list[ScanAlignment | None] = []
    wanted: Wanted = "nothing"
    while (stop := block + len(alignments)) in packed.rows and wanted == "nothing":
        alignment, asked = model.ask_pruner(stop, sequence)
        if asked == "delta" or (alignments and _kind(alignment) != _kind(alignments[0])):
            break
        alignments.append(alignment)
        wanted = asked
    if not alignments:
        return None
    journal.write(block, stop - 1, ONE_CALL)
    norm = model.layers[block].norm
    assert isinstance(norm, RMSNorm)
    frozen = None if sequence.frozen is None else unit_tokens(sequence, "frozen", norm)
    context = None if sequence.context is None else unit_tokens(sequence, "context", norm)
    hidden, residual, y = mamba_blocks(
        sequence.hidden,
        sequence.residual,
        packed.run(block, stop),
        packed.sizes,
        context=_together(frozen, context),
        scale=packed.scale,
        eps=packed.eps,
        wants_y=wanted == "y",
        **lost_tokens(sequence, alignments, packed.sizes.directions, packed.sizes.d_conv),
    )
    sequence = replace(sequence, hidden=hidden, residual=residual)
    statistics = ScanStatistics((y,) if wanted == "y" else ())
    return model.prune(stop - 1, sequence, statistics, wanted), stop
