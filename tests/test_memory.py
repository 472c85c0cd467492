"""Peak memory on the CPU, against sums made by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssmprune_cli.inference import prepare
from ssmprune_cli.workflows.measure.memory import peak_memory


class Chain(nn.Module):
    """Holds input, one intermediate and one result at its peak."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(256, 256))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(5):
            x = x * self.weight  # the old x is released only after the new one is made
        return x


def test_peak_is_weights_input_and_two_intermediates() -> None:
    size = 256 * 256 * 4
    # weight + the caller's input + (old x, new x)
    assert peak_memory(prepare(Chain()), torch.ones(256, 256)) == 4 * size


def test_views_are_not_counted_twice() -> None:
    class View(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(-1)[:10].unsqueeze(0)

    assert peak_memory(prepare(View()), torch.ones(64, 64)) == 64 * 64 * 4
