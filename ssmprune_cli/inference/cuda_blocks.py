"""Mamba blocks on a GPU: the inside of each in two kernels, once it was seen to agree and to be no slower.

Around it are the norm and two projections: five kernels a block. Nobody has yet run these kernels on a GPU, so a
session tries them first. On a batch of the user's each block is computed both ways from the same input, op by op and
fused; then both models are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from statistics import median

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.copying import as_kind, with_changes
from ssmprune_cli.inference.cpu.mamba import FusedMambaMixer, directions_of, inside_refused
from ssmprune_cli.inference.explain import Journal
from ssmprune_cli.inference.session import with_slot
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import pack_products, pick
from ssmprune_cli.models import Backbone, MambaMixer
from ssmprune_cli.tokens import TokenSequence

# How far the inside of a block may be from op by op, in units of its largest value there. Both round u, the steps and
# the result: in 16 bits, op by op was seen 2^-9 (float16) and 2^-6 (bfloat16) from float64. In float32 a GPU's exp is
# 2^-22 off in each step; its products may be in TensorFloat-32, which rounds as float16 does.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-7, torch.bfloat16: 2**-4}
ROUNDS = 7  # in which both are timed, one after the other


class Agreement:
    """How far fused blocks are from op by op, while somebody listens."""

    def __init__(self) -> None:
        self._errors: list[tuple[int, Tensor, Tensor]] | None = None

    @property
    def wanted(self) -> bool:
        return self._errors is not None

    def note(self, block: int, fused: Tensor, by_op: Tensor) -> None:
        assert self._errors is not None
        self._errors.append((block, (fused - by_op).abs().amax(), by_op.abs().amax()))

    @contextmanager
    def listening(self) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
        """Inside, the list grows by each fused block's number, largest error and largest value."""
        errors: list[tuple[int, Tensor, Tensor]] = []
        self._errors = errors
        try:
            yield errors
        finally:
            self._errors = None


class GpuMambaMixer(FusedMambaMixer):
    """A mixer whose inside is one call of `mamba_inner`; while its agreement is wanted, op by op beside that."""

    agreement: Agreement

    @cached_property
    def products(self) -> Tensor:
        """The weights of the products in the model's dtype, made once."""
        return pack_products(directions_of(self), self.in_proj.weight.dtype)

    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        if not self.agreement.wanted or wanted not in ("nothing", "tokens"):
            return super().mix(xz, sequence, alignment, wanted, frozen, context)
        mixed, statistics = MambaMixer.mix(self, xz, sequence, alignment, wanted, frozen, context)
        self.agreement.note(self.block, self.inside(xz, sequence, alignment, frozen, context), mixed)
        return mixed, statistics


class FusedBlocks:
    """A model's blocks, fused where they can be, and what is known of them.

    model    shares the tensors of the definition
    refused  why none of them is used, once that is known
    """

    def __init__(self, definition: Backbone, journal: Journal) -> None:
        self.refused: str | None = None
        self._agreement = Agreement()
        self._judged: list[str] = []
        reasons: dict[int, str] = {}
        changes: dict[nn.Module, Callable[[nn.Module], nn.Module]] = {}
        for number, module in enumerate(definition.mixers):
            mixer: object = module
            assert isinstance(mixer, nn.Module)
            reason = inside_refused(mixer) if isinstance(mixer, MambaMixer) else f"a {type(mixer).__name__}"
            if reason is None:
                changes[mixer] = self._fuse(number, journal)
            else:
                reasons[number] = reason
        fast = with_changes(definition, changes)
        assert isinstance(fast, Backbone)
        self.model: Backbone = fast
        self._skipped = ""
        if reasons:
            first = min(reasons)
            self._skipped = f"{len(reasons)} blocks are op by op (block {first + 1}: {reasons[first]})"
        backend = pick(next(definition.parameters()).new_empty(0, dtype=definition.dtype), 1)
        if not changes:
            self.refused = f"there is no block to fuse (block 1: {reasons.get(0, 'none')})"
        elif not backend.fuses:
            self.refused = f"the kernel backend {backend.name} has no fused blocks"

    def _fuse(self, number: int, journal: Journal) -> Callable[[nn.Module], nn.Module]:
        def fuse(mixer: nn.Module) -> nn.Module:
            return as_kind(mixer, GpuMambaMixer, block=number, journal=journal, why="", agreement=self._agreement)

        return fuse

    def with_pruner(self, pruner: Pruner | None) -> FusedBlocks:
        """The same blocks with another pruner, not yet judged."""
        other: FusedBlocks = object.__new__(FusedBlocks)
        other.__dict__.update(self.__dict__, model=with_slot(self.model, pruner), _judged=[])
        return other

    def agree(self, images: Tensor) -> bool:
        """Whether every block computes with `images` what it does op by op; if not, `refused` says which does not."""
        if self.refused is not None:
            return False
        with self._agreement.listening() as errors:
            self.model(images)
        tolerance = TOLERANCE[self.model.dtype]
        if self.model.dtype == torch.float32 and images.is_cuda and torch.backends.cuda.matmul.allow_tf32:
            tolerance = TOLERANCE[torch.float16]
        for block, error, largest in [(block, error.item(), largest.item()) for block, error, largest in errors]:
            if not error <= tolerance * largest:  # also if one is not a number
                self.refused = f"block {block + 1} differs by {error:.2g}, of values up to {largest:.2g}"
                return False
        return True

    def faster(self, by_op: Callable[[], object], fused: Callable[[], object], device: torch.device, what: str) -> bool:
        """Whether `fused` is no slower than `by_op`; `what` says for `notes` what it is that they compute."""
        times = [(seconds(by_op, device), seconds(fused, device)) for _ in range(ROUNDS)]
        slow, fast = (median(each) for each in zip(*times, strict=True))
        taken = fast <= slow
        ratio = slow / fast if taken else fast / slow
        result = f"fused, {ratio:.2f} times as fast as" if taken else f"not fused, as that takes {ratio:.2f} times"
        self._judged.append(f"blocks {result} op by op: {what}")
        return taken

    def refuse(self, error: BaseException) -> None:
        """Use none of them from now on, since `error` came out of them."""
        self.refused = (str(error) or type(error).__name__).splitlines()[0]

    def notes(self) -> tuple[str, ...]:
        if self.refused is not None:
            return (*self._judged, f"no fused blocks: {self.refused}")
        skipped = (self._skipped,) if self._skipped else ()
        return (*(self._judged or ["fused blocks are tried when a graph is recorded"]), *skipped)

    def tensors(self) -> list[Tensor]:
        """What they hold beside the definition's tensors."""
        made = (vars(module).get(name) for module in self.model.modules() for name in ("packed", "products"))
        return [tensor for tensor in made if isinstance(tensor, Tensor)]


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
