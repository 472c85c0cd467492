"""A convolution as the authors' heads have it: with a bias, or with a batch norm."""

from __future__ import annotations

from torch import Tensor, nn


class Convolution(nn.Module):
    """k x k, of the same size before and after. With `normed` a batch norm takes the place of the bias."""

    def __init__(self, dim: int, out: int, kernel: int, *, normed: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out, kernel, padding=kernel // 2, bias=not normed)
        self.bn = nn.BatchNorm2d(out) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, rows, columns) to as many rows and columns."""
        x = self.conv(x)
        return x if self.bn is None else self.bn(x)
