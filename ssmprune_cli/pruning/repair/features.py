"""What a repair is fitted to: what the head of a pruned model sees, what was dropped, and what the dense model says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import DataError, UsageError
from ssmprune_cli.interface import Pruner, ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.pruning.calibration import Prunable
from ssmprune_cli.pruning.correction import dropped_mean
from ssmprune_cli.pruning.pruner import TokenPruner
from ssmprune_cli.tokens import Readout, TokenSequence

Run = Callable[[Tensor], Tensor]
Runner = Callable[[Pruner | None], Run]  # a pruner -> the model with it, as a function of images (B, 3, H, W)


class FeaturePruner(nn.Module, Pruner):
    """Prunes as `inner`, and makes the model say what its head would see in the place of logits: x (B, d), followed by
    the `dropped_mean` (B, w) of every point at which `inner` drops tokens.

    inner  None prunes nothing
    last   the model's last block
    """

    def __init__(self, inner: TokenPruner | None, last: int) -> None:
        super().__init__()
        self.inner = inner
        self.last = last

    def wants(self, block: int) -> Wanted:
        if self.inner is None:
            return "tokens" if block == self.last else "nothing"
        return self.inner.wants(block)

    def alignment(self, block: int) -> ScanAlignment | None:
        return None if self.inner is None else self.inner.alignment(block)

    def forward(self, block: int, sequence: TokenSequence, statistics: ScanStatistics) -> TokenSequence:
        if self.inner is None:
            return replace(sequence, readout=_Raw())
        after: TokenSequence = self.inner(block, sequence, statistics)
        if after is sequence:
            return after
        side = None if sequence.readout is None else sequence.readout.side
        if block + 1 in self.inner.dropping_points:
            mean = dropped_mean(sequence, after)
            side = mean if side is None else torch.cat((side, mean), dim=1)
        return replace(after, readout=_Raw(side))


class _Raw(Readout):
    """Says what the head would see, and what there is beside it."""

    def logits(self, pooled: Tensor, layer: nn.Linear) -> Tensor:
        return pooled if self.side is None else torch.cat((pooled.to(self.side.dtype), self.side), dim=1)


def model_runner(model: Prunable) -> Runner:
    """Runs `model` itself, op by op."""

    def with_pruner(pruner: Pruner | None) -> Run:
        def run(images: Tensor) -> Tensor:
            installed = model.pruner
            try:
                model.pruner = pruner
                with torch.inference_mode():
                    outputs: Tensor = model.forward(images)
                    return outputs
            finally:
                model.pruner = installed

        return run

    return with_pruner


@dataclass(frozen=True)
class Features:
    """Of N images, all float64 on the CPU.

    pooled  (N, d) what the pruned model's head sees
    side    (N, w) the `dropped_mean` of every point, one after another
    dense   (N, classes) logits of the dense model
    """

    pooled: Tensor
    side: Tensor
    dense: Tensor

    def __len__(self) -> int:
        return len(self.dense)

    def take(self, rows: Tensor) -> Features:
        """The images at `rows` (n,)."""
        return Features(self.pooled[rows], self.side[rows], self.dense[rows])

    def without_side(self) -> Features:
        return replace(self, side=self.side[:, :0])


def collect(
    pruner: TokenPruner | None,
    last: int,
    features: int,
    batches: Iterable[Tensor],
    runner: Runner,
    dense: Tensor | None = None,
) -> Features:
    """One pass with `pruner`, and one of the dense model unless its logits are given; `last` is the last block and
    `features` is d. Raises DataError if there are no images, UsageError if there are not as many logits."""
    pruned, answer = runner(FeaturePruner(pruner, last)), runner(None)
    seen, said = [], []
    for images in batches:
        seen.append(pruned(images).double().cpu())
        if dense is None:
            said.append(answer(images).double().cpu())
    if not seen:
        raise DataError("there are no images to fit a repair to")
    both = torch.cat(seen)
    logits = torch.cat(said) if dense is None else dense.double().cpu()
    if len(logits) != len(both):
        raise UsageError(f"there are dense logits of {len(logits)} images, and {len(both)} images")
    return Features(both[:, :features], both[:, features:], logits)
