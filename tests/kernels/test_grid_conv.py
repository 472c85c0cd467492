"""The depthwise grid convolution, dense and with tokens missing, against one that is written out in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import grid_conv2d


def by_loops(x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], positions: Tensor) -> Tensor:
    rows, columns = grid
    half = weight.shape[-1] // 2
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        place = {int(p): i for i, p in enumerate(positions[b])}
        for position, i in place.items():
            row, column = divmod(position, columns)
            total = torch.zeros_like(x[b, i]) if bias is None else bias.clone()
            for r in range(max(0, row - half), min(rows, row + half + 1)):
                for c in range(max(0, column - half), min(columns, column + half + 1)):
                    if r * columns + c in place:
                        total += x[b, place[r * columns + c]] * weight[:, r - row + half, c - column + half]
            y[b, i] = torch.nn.functional.silu(total)
    return y


@pytest.mark.parametrize(("grid", "width", "has_bias"), [((4, 5), 3, False), ((5, 3), 7, True), ((1, 6), 3, True)])
def test_equals_the_loops_dense_and_with_tokens_missing(grid: tuple[int, int], width: int, has_bias: bool) -> None:
    tokens = grid[0] * grid[1]
    x = torch.randn(2, tokens, 3, dtype=torch.float64)
    weight = torch.randn(3, width, width, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64) if has_bias else None
    everywhere = torch.arange(tokens).expand(2, -1)
    expected = by_loops(x, weight, bias, grid, everywhere)
    torch.testing.assert_close(grid_conv2d(x, weight, bias, grid), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grid_conv2d(x, weight, bias, grid, everywhere), expected, rtol=0, atol=1e-12)
    kept = torch.stack([torch.randperm(tokens)[: tokens // 2].sort().values for _ in range(2)])
    fewer = x[:, : tokens // 2]
    expected = by_loops(fewer, weight, bias, grid, kept)
    torch.testing.assert_close(grid_conv2d(fewer, weight, bias, grid, kept), expected, rtol=0, atol=1e-12)


def test_tokens_that_do_not_fill_the_grid_need_positions() -> None:
    with pytest.raises(KernelError, match=r"5 tokens .* grid of 2 x 3"):
        grid_conv2d(torch.zeros(1, 5, 2), torch.zeros(2, 3, 3), None, (2, 3))
