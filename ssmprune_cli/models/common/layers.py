"""Layers that several model families share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ssmprune_cli.errors import DataError


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least, as the authors compute it."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def channels_last_taps(weight: Tensor) -> Tensor:
    """Taps (E, K) or (E, K, K) of a depthwise convolution's weight (E, 1, ...), neighbouring channels side by side."""
    return weight[:, 0].movedim(0, -1).contiguous().movedim(-1, 0)


class RMSNorm(nn.Module):
    """Divide by the root mean square over channels, then scale. In the input's precision, as the authors."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.unit(x).to(self.weight.dtype) * self.weight

    def unit(self, x: Tensor) -> Tensor:
        """`x` (..., d) with a root mean square of 1."""
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)


class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) to embedded patches (B, rows * columns, d), which overlap if stride < patch_size."""

    def __init__(self, image_size: tuple[int, int], patch_size: int, stride: int, dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = patch_grid(image_size, patch_size, stride)
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=stride)
        # LeCun normal, truncated at two standard deviations; the constant makes up for what truncation takes away.
        deviation = math.sqrt(1 / (3 * patch_size**2)) / 0.87962566103423978
        nn.init.trunc_normal_(self.proj.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
        nn.init.zeros_(self.proj.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        check_size(images, self.image_size)
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).transpose(1, 2)


def check_size(images: Tensor, image_size: tuple[int, int]) -> None:
    """DataError unless `images` are (B, 3, H, W) of this height and width."""
    size = (3, *image_size)
    if tuple(images.shape[1:]) != size:
        raise DataError(
            f"the model takes images of shape {size}, not {tuple(images.shape[1:])}",
            hint="Resize the images, or load the checkpoint for another size (`--image-size`).",
        )


def patch_grid(image_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Rows and columns of patches."""
    return (image_size[0] - patch_size) // stride + 1, (image_size[1] - patch_size) // stride + 1


class RotaryEmbedding(nn.Module):
    """2-D rotary position embedding of whole tokens, as EVA-02 and the first Vim release use it.

    The first half of the channels turns with the patch's row, the second half with its column. Positions are scaled
    to a grid of 14 x 14, the authors' training resolution. With a class token, dense position 0 is not turned and
    position p > 0 takes row p - 1 of the table, wherever the class token itself sits: that is what the authors compute.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, dim: int, grid: tuple[int, int], *, class_token: bool) -> None:
        super().__init__()
        self.class_token = class_token
        if torch.empty(0).is_meta:  # arithmetic there would have PyTorch import its compiler, for a second
            cos, sin = torch.empty(2, grid[0] * grid[1], dim)
        else:
            cos, sin = rotary_tables(dim, grid)
        self.register_buffer("freqs_cos", cos)  # (rows * columns, d)
        self.register_buffer("freqs_sin", sin)

    def forward(self, values: Tensor, positions: Tensor | None) -> Tensor:
        """Rotate `values` (B, L, d), each by its own of `positions` (B, L); None is all of them in order."""
        cos, sin = self.freqs_cos, self.freqs_sin
        if self.class_token:
            cos = torch.cat((torch.ones_like(cos[:1]), cos))
            sin = torch.cat((torch.zeros_like(sin[:1]), sin))
        if positions is not None:
            cos, sin = cos[positions], sin[positions]  # (B, L, d)
        pairs = values.unflatten(-1, (-1, 2))
        turned = torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
        return values * cos + turned * sin


def rotary_tables(dim: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (rows * columns, dim) each, for `dim` channels: half for rows, half for columns."""
    half = dim // 2
    frequencies = 10000.0 ** (-torch.arange(0, half, 2).float() / half)  # (dim / 4,)

    def angles(count: int) -> Tensor:
        steps = torch.arange(count) / count * 14
        return (steps[:, None] * frequencies).repeat_interleave(2, dim=-1)  # (count, dim / 2)

    rows, columns = angles(grid[0]), angles(grid[1])
    shape = (*grid, rows.shape[-1])
    table = torch.cat((rows[:, None].expand(shape), columns[None].expand(shape)), dim=-1).flatten(0, 1)
    return table.cos(), table.sin()


def resize_grid(patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings of patches, (1, rows * columns, d), from the grid `old` to `new` by bicubic interpolation."""
    image = patches.unflatten(1, old).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(image, size=new, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(1, 2).contiguous()
