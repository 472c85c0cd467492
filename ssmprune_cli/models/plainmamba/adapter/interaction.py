"""How the tokens of the backbone and those of the spatial prior see each other. Chen et al., arXiv 2205.08534.

Written from ChenhongyiYang/PlainMamba 0975a1d, with its parameter names. An *injector* adds to the backbone's tokens
what they see in the prior's maps; an *extractor* adds to the prior's tokens what they see in the backbone's grid.
Letters: B batch, L backbone's tokens now, G places of their grid, C tokens of the prior's three maps, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.grids import Grid
from ssmprune_cli.models.plainmamba.adapter.attention import DeformableAttention

NORM_EPS = 1e-6
MAPS = 3  # of the prior that take part


class Injector(nn.Module):
    """See the module."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DeformableAttention(dim, heads, MAPS)
        self.gamma = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, centres: Tensor, prior: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tokens x (B, L, d) at `centres` (B or 1, L, 2), with what they see of `prior` (B, C, d)."""
        seen: Tensor = self.attn(self.query_norm(x), centres, self.feat_norm(prior), grids)
        return x + self.gamma * seen


class MapConvolution(nn.Module):
    """A depthwise 3 x 3 convolution of each map by itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        """(B, C, d) to (B, C, d): maps of the sizes `grids`, one after another."""
        maps = tokens.transpose(1, 2).split([rows * columns for rows, columns in grids], dim=2)
        convolved = [self.dwconv(each.unflatten(2, grid)).flatten(2) for each, grid in zip(maps, grids, strict=True)]
        return torch.cat(convolved, dim=2).transpose(1, 2)


class ConvolutionalMLP(nn.Module):
    """Two linear layers, with a convolution and a GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = MapConvolution(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor, grids: Sequence[Grid]) -> Tensor:
        result: Tensor = self.fc2(functional.gelu(self.dwconv(self.fc1(tokens), grids)))
        return result


class Extractor(nn.Module):
    """See the module. `hidden` channels in its MLP."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feat_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = DeformableAttention(dim, heads, 1)
        self.ffn = ConvolutionalMLP(dim, hidden)
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, prior: Tensor, centres: Tensor, grids: Sequence[Grid], whole: Tensor, grid: Grid) -> Tensor:
        """The tokens `prior` (B, C, d) of maps of the sizes `grids`, with centres (1, C, 2) and what they see of the
        backbone's whole `grid`, `whole` (B, G, d)."""
        prior = prior + self.attn(self.query_norm(prior), centres, self.feat_norm(whole), [grid])
        result: Tensor = prior + self.ffn(self.ffn_norm(prior), grids)
        return result


class Interaction(nn.Module):
    """An injector before some blocks, and an extractor after them; the last interaction has two more extractors."""

    def __init__(self, dim: int, heads: int, hidden: int, *, last: bool) -> None:
        super().__init__()
        self.injector = Injector(dim, heads)
        self.extractor = Extractor(dim, heads, hidden)
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, hidden) for _ in range(2)) if last else None

    @property
    def extractors(self) -> list[Extractor]:
        """All of them, in order."""
        return [self.extractor, *(self.extra_extractors or [])]
