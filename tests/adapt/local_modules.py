"""Mixers with LocalMamba's parameters, written from their description: one place of the grid after the other.

`choices` are the ways of the scans: rows `h`, columns `v`, windows `w2`, each row by row, and `_flip` backwards. Where
windows reach over the edge of the grid, the scan meets tokens of zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.adapt.modules import scan

Grid = tuple[int, int]


def way(direction: str, grid: Grid) -> list[int]:
    """The place of each step, row by row; -1 beside the grid."""
    (rows, columns), name = grid, direction.removesuffix("_flip")
    if name == "h":
        places = [(row, column) for row in range(rows) for column in range(columns)]
    elif name == "v":
        places = [(row, column) for column in range(columns) for row in range(rows)]
    else:
        side = int(name[1:])
        corners = [(top, left) for top in range(0, rows, side) for left in range(0, columns, side)]
        places = [(top + at // side, left + at % side) for top, left in corners for at in range(side * side)]
    steps = [row * columns + column if row < rows and column < columns else -1 for row, column in places]
    return steps[::-1] if direction.endswith("_flip") else steps


def along(x: Tensor, steps: list[int]) -> Tensor:
    """`x` (B, L, c) in the order of the steps; zeros beside the grid."""
    return torch.cat((x, torch.zeros_like(x[:, :1])), dim=1)[:, steps]


def home(y: Tensor, steps: list[int]) -> Tensor:
    """The inverse of `along`."""
    return torch.stack([y[:, steps.index(place)] for place in range(max(steps) + 1)], dim=1)


class MultiScan(nn.Module):
    def __init__(self, choices: list[str], token_size: Grid | None = None) -> None:
        super().__init__()
        self.choices, self.token_size = choices, token_size


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, channels // 8)
        self.channel_select = nn.Linear(channels // 8, channels)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm(x).mean(1, keepdim=True)
        factors: Tensor = self.channel_select(functional.gelu(self.global_reduce(mean))).sigmoid()
        return x * factors


class GatedMultiScan(MultiScan):
    def __init__(self, choices: list[str], channels: int) -> None:
        super().__init__(choices)
        self.attn = Gate(channels)


class MultiMamba(nn.Module):
    """LocalVim's: tokens (B, L, d), a branch and a gate over z for each way; with `middle`, a class token amid them."""

    def __init__(
        self,
        choices: list[str],
        token_size: Grid = (5, 3),
        *,
        width: int = 16,
        state: int = 4,
        rank: int = 2,
        middle: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        inner, taps = 2 * width, 4
        self.use_middle_cls_token, self.splits = middle, [rank, state, state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.multi_scan = MultiScan(choices, token_size)
        for number in range(len(choices)):
            rates = torch.arange(1.0, state + 1).repeat(inner, 1).log()
            self.register_parameter(f"A_log_{number}", nn.Parameter(rates + 0.1 * torch.randn_like(rates)))
            self.register_parameter(f"D_{number}", nn.Parameter(torch.randn(inner)))
            conv = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1, bias=bias)
            self.add_module(f"conv1d_{number}", conv)
            self.add_module(f"x_proj_{number}", nn.Linear(inner, sum(self.splits), bias=False))
            self.add_module(f"dt_proj_{number}", nn.Linear(rank, inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.attn = Gate(inner)

    def forward(self, x: Tensor) -> Tensor:
        xz, total = self.in_proj(x), torch.zeros(())
        grid = self.multi_scan.token_size
        assert grid is not None
        at = (x.shape[1] - 1) // 2
        for number, direction in enumerate(self.multi_scan.choices):
            steps = way(direction, grid)
            if self.use_middle_cls_token:
                steps = [place + (place >= at) for place in steps]
                steps.insert(at, at)
            y = home(self._branch(along(xz, steps), number), steps)
            total = total + self.attn(y)
        out: Tensor = self.out_proj(total)
        return out

    def _branch(self, xz: Tensor, number: int) -> Tensor:
        def part(name: str, values: Tensor) -> Tensor:
            result: Tensor = self.get_submodule(f"{name}_{number}")(values)
            return result

        u, z = xz.chunk(2, dim=-1)
        u = functional.silu(part("conv1d", u.transpose(1, 2))[..., : u.shape[1]].transpose(1, 2))
        step, b, c = part("x_proj", u).split(self.splits, dim=-1)
        delta, rates = functional.softplus(part("dt_proj", step)), -self.get_parameter(f"A_log_{number}").exp()
        return scan(u, delta, rates, b, c, self.get_parameter(f"D_{number}")) * functional.silu(z)


class LocalSS2D(nn.Module):
    """LocalVMamba's: a grid (B, H, W, d), of which the convolution makes what all ways scan."""

    def __init__(self, choices: list[str], *, width: int = 8, state: int = 4, rank: int = 2) -> None:
        super().__init__()
        inner, ways = 2 * width, len(choices)
        self.splits = [rank, state, state]
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(0.3 * torch.randn(ways, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(0.3 * torch.randn(ways, inner, rank))
        self.dt_projs_bias = nn.Parameter(0.3 * torch.randn(ways, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).repeat(ways * inner, 1).log())
        self.Ds = nn.Parameter(torch.ones(ways * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.dropout = nn.Identity()
        self.multi_scan = GatedMultiScan(choices, inner)

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.act(self.conv2d(u.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)  # (B, L, E)
        mixed = self.mix(u, grid).unflatten(1, grid) * self.act(z)
        out: Tensor = self.dropout(self.out_proj(mixed))
        return out

    def mix(self, u: Tensor, grid: Grid) -> Tensor:
        """What all scans together make of u (B, L, E)."""
        rates, skips = (each.unflatten(0, (len(self.multi_scan.choices), -1)) for each in (self.A_logs, self.Ds))
        total = torch.zeros_like(u)
        for number, direction in enumerate(self.multi_scan.choices):
            steps = way(direction, grid)
            turned = along(u, steps)
            step, b, c = functional.linear(turned, self.x_proj_weight[number]).split(self.splits, dim=-1)
            raw = functional.linear(step, self.dt_projs_weight[number], self.dt_projs_bias[number])
            y = scan(turned, functional.softplus(raw), -rates[number].exp(), b, c, skips[number])
            total = total + self.multi_scan.attn(home(y, steps))
        normed: Tensor = self.out_norm(total)
        return normed
