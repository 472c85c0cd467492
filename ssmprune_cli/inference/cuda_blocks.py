"""Mamba blocks on a GPU: the inside of each in two kernels, once it was seen to agree and to be no slower.

Around it are the norm and two projections: five kernels a block. Nobody has yet run these kernels on a GPU, so a
session tries them first. On a batch of the user's each block is computed both ways from the same input, op by op and
fused; then both models are timed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmprune_cli.inference.copying import as_kind, with_changes
from ssmprune_cli.inference.explain import Journal
from ssmprune_cli.inference.inside import FusedMambaMixer, directions_of, inside_refused
from ssmprune_cli.inference.session import with_slot
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import inner_composed, mamba_inner, pack_products, pick
from ssmprune_cli.models import Backbone, MambaMixer
from ssmprune_cli.tokens import TokenSequence

# How far the inside of a block may be from op by op, in units of its largest value there. Both round u, the steps and
# the result: in 16 bits, op by op was seen 2^-9 (float16) and 2^-6 (bfloat16) from float64. In float32 a GPU's exp is
# 2^-22 off in each step; its products may be in TensorFloat-32, which rounds as float16 does.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-7, torch.bfloat16: 2**-4}
ROUNDS = 7  # in which both are timed, one after the other


class Trial(NamedTuple):
    """Of one block: why it is not fused, or its largest error and its largest value."""

    block: int
    found: str | tuple[Tensor, Tensor]


class Trials(threading.local):
    """What fused blocks write down while somebody listens; each thread has its own: sessions share their blocks."""

    def __init__(self) -> None:
        self.kept: list[Trial] | None = None

    def __reduce__(self) -> tuple[type[Trials], tuple[()]]:
        return Trials, ()  # a copy of a session has some of its own

    @contextmanager
    def listening(self) -> Iterator[list[Trial]]:
        """Inside, the list grows by each block that can be fused."""
        kept: list[Trial] = []
        self.kept = kept
        try:
            yield kept
        finally:
            self.kept = None


class GpuMambaMixer(FusedMambaMixer):
    """A mixer whose inside is one call of `mamba_inner`; in a trial it is computed op by op beside that."""

    trials: Trials

    @cached_property
    def products(self) -> Tensor:
        """The weights of the products in the model's dtype, made once."""
        return pack_products(directions_of(self), self.x_proj.weight.dtype)

    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        trials = self.trials.kept
        if trials is None or wanted not in ("nothing", "tokens"):
            return super().mix(xz, sequence, alignment, wanted, frozen, context)
        mixed, statistics = MambaMixer.mix(self, xz, sequence, alignment, wanted, frozen, context)
        arguments = self.arguments(xz, sequence, alignment, frozen, context)
        found: str | tuple[Tensor, Tensor] | None = inner_composed(**arguments)
        if found is None:
            found = (mamba_inner(**arguments) - mixed).abs().amax(), mixed.abs().amax()
        trials.append(Trial(self.block, found))
        return mixed, statistics


class FusedBlocks:
    """A model's blocks, fused where they can be, and what is known of them.

    model    shares the tensors of the definition
    refused  why none of them is used, once that is known
    """

    def __init__(self, definition: Backbone, journal: Journal) -> None:
        self.refused: str | None = None
        self._trials = Trials()
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
            return as_kind(mixer, GpuMambaMixer, block=number, journal=journal, why="", trials=self._trials)

        return fuse

    def with_pruner(self, pruner: Pruner | None) -> FusedBlocks:
        """The same blocks with another pruner, not yet judged."""
        other: FusedBlocks = object.__new__(FusedBlocks)
        other.__dict__.update(self.__dict__, model=with_slot(self.model, pruner), _judged=[])
        return other

    def agree(self, images: Tensor) -> bool:
        """Whether blocks are fused with `images`, and compute what they do op by op; if one does not, `refused` says
        which."""
        if self.refused is not None:
            return False
        with self._trials.listening() as trials:
            self.model(images)
        tolerance = TOLERANCE[self.model.dtype]
        if self.model.dtype == torch.float32 and images.is_cuda and torch.backends.cuda.matmul.allow_tf32:
            tolerance = TOLERANCE[torch.float16]
        reasons = [found for _, found in trials if isinstance(found, str)]
        for block, found in trials:
            if not isinstance(found, str):
                error, largest = (each.item() for each in found)
                if not error <= tolerance * largest:  # also if one is not a number
                    self.refused = f"block {block + 1} differs by {error:.2g}, of values up to {largest:.2g}"
                    return False
        if len(reasons) < len(trials):
            return True
        why = reasons[0] if reasons else "the pruner looks at their scans"
        self._judged.append(f"blocks not fused: {shape_of(images)} ({why})")
        return False

    def faster(self, by_op: Callable[[], object], fused: Callable[[], object], images: Tensor) -> bool:
        """Whether `fused` is no slower than `by_op`, which both compute `images`."""
        times = [(seconds(by_op, images.device), seconds(fused, images.device)) for _ in range(ROUNDS)]
        slow, fast = (median(each) for each in zip(*times, strict=True))
        taken = bool(fast <= slow)
        ratio = slow / fast if taken else fast / slow
        result = f"fused, {ratio:.2f} times as fast as" if taken else f"not fused, as that takes {ratio:.2f} times"
        self._judged.append(f"blocks {result} op by op: {shape_of(images)}")
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


def shape_of(images: Tensor) -> str:
    return "x".join(map(str, images.shape))


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """How long `run` takes until the GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
