"""The depthwise 2-D convolution with SiLU over a grid of tokens of which some are missing."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ssmprune_cli.errors import KernelError


def grid_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, grid: tuple[int, int], positions: Tensor | None = None
) -> Tensor:
    """silu(depthwise convolution) of tokens x (B, L, E), each at its place on `grid` (rows, columns); missing ones are 0.

    weight     (E, K, K) with K odd; zero padding, so that the grid keeps its size
    bias       (E,) or None
    positions  (B, L) int64 raster index of each token; None when x is the whole grid

    Returns (B, L, E), the values at the tokens' own places. Raises KernelError for shapes that do not fit.
    """
    rows, columns = grid
    batch, length, channels = x.shape
    if positions is None and length != rows * columns:
        raise KernelError(f"{length} tokens without positions do not fill a grid of {rows} x {columns}")
    dense = x
    if positions is not None:
        index = positions[..., None].expand(-1, -1, channels)  # (B, L, E)
        dense = x.new_zeros(batch, rows * columns, channels).scatter(1, index, x)
    image = dense.transpose(1, 2).unflatten(2, grid)  # (B, E, rows, columns)
    width = weight.shape[-1]
    image = functional.silu(functional.conv2d(image, weight[:, None], bias, padding=width // 2, groups=channels))
    y = image.flatten(2).transpose(1, 2)  # (B, rows * columns, E)
    return y if positions is None else y.gather(1, positions[..., None].expand(-1, -1, channels))
