"""Mamba blocks: all between two prune points in one call, or the inside of a block in one, or each of its directions.

Letters: B batch, L tokens now, F frozen tokens, M tokens that only convolutions see, d model width, E inner channels,
G directions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.behaviour import first_unlike
from ssmprune_cli.inference.copying import as_kind
from ssmprune_cli.inference.explain import BY_OP, Journal
from ssmprune_cli.inference.inside import directions_of, inside_refused, lost_tokens, of_one, together, weight_of
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import (
    BlockSizes,
    EightBit,
    mamba_blocks,
    mamba_inner,
    pack_block,
    pack_inner,
    pick,
)
from ssmprune_cli.models import (
    BranchMixer,
    EightBitLinear,
    LocalMixer,
    MambaBlock,
    MambaMixer,
    MambaSequence,
    RMSNorm,
    scan_path,
    unit_tokens,
)
from ssmprune_cli.tokens import TokenSequence

ONE_CALL = "one call"
BRANCHES = "each direction of a block in one call"


def sizes_of(mixer: MambaMixer, parts: int) -> BlockSizes:
    eight_bits = 0
    if isinstance(mixer.in_proj, EightBitLinear):
        eight_bits = 2 if all(isinstance(branch.x_proj, EightBitLinear) for branch in mixer.branches()) else 1
        parts = 0
    return BlockSizes(mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.splits[0], mixer.directions, parts, eight_bits)


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
                context=together(frozen, context),
                scale=1.0,
                **of_one(lost_tokens(way.sequence, [own], 1, self.d_conv)),
            )
            outputs.append(way.home(output))
        return self.merge(outputs, sequence), ScanStatistics()


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
    out_proj = weight_of(mixer.out_proj)
    if mixer.gamma is not None and isinstance(out_proj, EightBit):
        out_proj = out_proj._replace(scale=out_proj.scale * mixer.gamma.float())
    elif mixer.gamma is not None and isinstance(out_proj, Tensor):
        out_proj = out_proj * mixer.gamma[:, None]
    return pack_block(block.norm.weight, weight_of(mixer.in_proj), out_proj, directions_of(mixer), parts)


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
        context=together(frozen, context),
        scale=packed.scale,
        eps=packed.eps,
        wants_y=wanted == "y",
        **lost_tokens(sequence, alignments, packed.sizes.directions, packed.sizes.d_conv),
    )
    sequence = replace(sequence, hidden=hidden, residual=residual)
    statistics = ScanStatistics((y,) if wanted == "y" else ())
    return model.prune(stop - 1, sequence, statistics, wanted), stop
