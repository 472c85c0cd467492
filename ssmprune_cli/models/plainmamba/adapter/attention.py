"""Multi-scale deformable attention: each query looks at a few places near its own. Zhu et al., arXiv 2010.04159.

Written from mmcv 2.1.0 (multi_scale_deformable_attn_pytorch) with its parameter names. Letters: B batch, Q queries,
V values, d width, H heads, E = d / H, M maps, P places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.grids import Grid

POINTS = 4  # places in each map


class DeformableAttention(nn.Module):
    """Looks at `maps` grids at once."""

    def __init__(self, dim: int, heads: int, maps: int) -> None:
        super().__init__()
        self.heads, self.maps = heads, maps
        self.sampling_offsets = nn.Linear(dim, heads * maps * POINTS * 2)
        self.attention_weights = nn.Linear(dim, heads * maps * POINTS)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the authors: each head looks in its own direction, point after point one cell further."""
        for layer in (self.sampling_offsets, self.attention_weights):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        offsets: list[float] = []  # (H, M, P, 2); numbers, since arithmetic on the meta device imports a compiler
        for head in range(self.heads):
            x, y = (turn(2 * math.pi * head / self.heads) for turn in (math.cos, math.sin))
            longest = max(abs(x), abs(y))
            steps = [(x / longest * step, y / longest * step) for step in range(1, POINTS + 1)]
            offsets += [side for _ in range(self.maps) for place in steps for side in place]
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(torch.tensor(offsets))
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, queries: Tensor, centres: Tensor, values: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(B, Q, d) for `queries` (B, Q, d) at `centres` (B or 1, Q, 2).

        centres  x and y of each query, from 0 to 1 over the image
        values   (B, V, d): the maps one after another, each in raster order
        grids    rows and columns of each map
        """
        batch, count, dim = queries.shape
        sizes = queries.new_tensor([(columns, rows) for rows, columns in grids])  # (M, 2)
        offsets = self.sampling_offsets(queries).view(batch, count, self.heads, self.maps, POINTS, 2)
        places = centres[:, :, None, None, None] + offsets / sizes[:, None]  # (B, Q, H, M, P, 2)
        weights = self.attention_weights(queries).view(batch, count, self.heads, -1).softmax(dim=-1)
        weights = weights.permute(0, 2, 1, 3).flatten(0, 1).unflatten(2, (self.maps, POINTS))  # (B * H, Q, M, P)
        places = (2 * places - 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 1)  # (B * H, M, Q, P, 2)
        maps = self.value_proj(values).split([rows * columns for rows, columns in grids], dim=1)
        looked = queries.new_zeros(batch * self.heads, dim // self.heads, count)
        for number, (each, grid) in enumerate(zip(maps, grids, strict=True)):
            image = each.transpose(1, 2).reshape(batch * self.heads, -1, *grid)  # (B * H, E, rows, columns)
            seen = functional.grid_sample(image, places[:, number], align_corners=False)  # (B * H, E, Q, P)
            looked = looked + (seen * weights[:, None, :, number]).sum(dim=3)
        result: Tensor = self.output_proj(looked.view(batch, dim, count).transpose(1, 2))
        return result


def grid_centres(grids: Sequence[Grid], like: Tensor) -> Tensor:
    """(1, cells, 2): x and y of the centre of every cell of `grids`, one after another, from 0 to 1 over the image."""
    found = []
    for rows, columns in grids:
        y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (rows, columns))
        found.append(torch.stack((x.expand(rows, -1), y[:, None].expand(-1, columns)), dim=-1).flatten(0, 1))
    return torch.cat(found)[None]
