"""What surrounds VMamba's mixers: patch embedding, the MLP, and downsampling between stages. MzeroMiko/VMamba 2ed52ea.

Modules sit at the indices that the authors' nn.Sequential has; what has no weights there (permutations, activations)
is done in `forward`. Their LayerNorm2d is a LayerNorm over channels, which are last here, so both of their norms are
one. Letters: B batch, d model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.grids import Grid, divided

STRIDE = 2  # of every downsampling


class PatchEmbedV1(nn.ModuleDict):
    """4x4 patches that do not overlap (v0 models). Pixels beyond the last whole patch are not seen."""

    def __init__(self, dim: int) -> None:
        super().__init__({"0": nn.Conv2d(3, dim, 4, stride=4), "2": nn.LayerNorm(dim)})

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, rows, columns, d)."""
        return _normed(self["2"], self["0"](images))

    @staticmethod
    def grid(image_size: Grid) -> Grid:
        return image_size[0] // 4, image_size[1] // 4


class PatchEmbedV2(nn.ModuleDict):
    """Two overlapping 3x3 convolutions with stride 2 (v2 models)."""

    def __init__(self, dim: int) -> None:
        first, second = (
            nn.Conv2d(width, out, 3, stride=2, padding=1) for width, out in ((3, dim // 2), (dim // 2, dim))
        )
        super().__init__({"0": first, "2": nn.LayerNorm(dim // 2), "5": second, "7": nn.LayerNorm(dim)})

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, rows, columns, d)."""
        x = functional.gelu(_normed(self["2"], self["0"](images)))  # (B, H / 2, W / 2, d / 2)
        return _normed(self["7"], self["5"](x.permute(0, 3, 1, 2)))

    @staticmethod
    def grid(image_size: Grid) -> Grid:
        return divided(divided(image_size, 2), 2)


class DownsampleV3(nn.ModuleDict):
    """One overlapping 3x3 convolution with stride 2 (v2 models)."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__({"1": nn.Conv2d(dim, out, 3, stride=2, padding=1), "3": nn.LayerNorm(out)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, columns, d) to half as many rows and columns, rounded up."""
        return _normed(self["3"], self["1"](x.permute(0, 3, 1, 2)))


class DownsampleV1(nn.Module):
    """Patch merging (v0 models): the channels of 2x2 neighbours, normalised and projected."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out, bias=False)
        nn.init.trunc_normal_(self.reduction.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, rows, columns, d) to half as many rows and columns, rounded up: a missing neighbour is zero."""
        x = functional.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        quarters = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged: Tensor = self.reduction(self.norm(torch.cat(quarters, dim=-1)))
        return merged


class MLP(nn.Module):
    """Two linear layers with a GELU between them, for one token at a time."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc2(functional.gelu(self.fc1(x)))
        return result


def _normed(norm: nn.Module, image: Tensor) -> Tensor:
    """Normalise (B, d, rows, columns) over channels: (B, rows, columns, d)."""
    normed: Tensor = norm(image.permute(0, 2, 3, 1))
    return normed
