"""What the blocks of every family have in common when they are trained: stochastic depth and recomputation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.tokens import TokenSequence


class Block(nn.Module, ABC):
    """A block says `run`, and passes what it adds to the residual stream through `drop`.

    drop_rate  share of images for which a training step leaves the block out
    recompute  whether training keeps only the block's input, and computes the rest again for the gradient
    """

    drop_rate: float = 0.0
    recompute: bool = False

    @abstractmethod
    def run(self, *inputs: Any) -> tuple[TokenSequence, ScanStatistics]:
        """The block itself; the inputs are its family's."""

    def forward(self, *inputs: Any) -> tuple[TokenSequence, ScanStatistics]:
        if self.recompute and self.training and torch.is_grad_enabled():
            result: tuple[TokenSequence, ScanStatistics] = checkpoint(self.run, *inputs, use_reentrant=False)
            return result
        return self.run(*inputs)

    def drop(self, branch: Tensor) -> Tensor:
        """`branch` (B, ...), zero for `drop_rate` of the images and larger for the others, so that its mean stays."""
        if not (self.training and self.drop_rate):
            return branch
        stays = torch.rand(len(branch), device=branch.device) >= self.drop_rate
        return branch * (stays / (1 - self.drop_rate)).to(branch.dtype).view(-1, *[1] * (branch.ndim - 1))


def set_drop_path(blocks: Sequence[Block], rate: float) -> None:
    """Stochastic depth: rates that rise linearly from 0 at the first block to `rate` at the last one."""
    for number, block in enumerate(blocks):
        block.drop_rate = rate * number / max(len(blocks) - 1, 1)


def set_recompute(blocks: Sequence[Block], recompute: bool) -> None:
    """Activation checkpointing of every block."""
    for block in blocks:
        block.recompute = recompute
