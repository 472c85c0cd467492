"""Modules as users write them: plain loops over the tokens, in nobody's library."""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn
from torch.nn import functional


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u, delta (B, L, E), B, C (B, L, N): (B, L, E), one token after the other."""
    state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for token in range(u.shape[1]):
        step = delta[:, token, :, None]
        state = torch.exp(step * A) * state + step * B[:, token, None] * u[:, token, :, None]
        outputs.append((state * C[:, token, None]).sum(-1) + D * u[:, token])
    return torch.stack(outputs, dim=1)


class Mixer(nn.Module):
    """The layout of mamba-minimal."""

    def __init__(self, width: int = 16, state: int = 4, rank: int = 2, taps: int = 4) -> None:
        super().__init__()
        inner = 2 * width
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, taps, groups=inner, padding=taps - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).repeat(inner, 1).log())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.splits = [rank, state, state]

    def forward(self, x: Tensor, offset: float | None = None) -> Tensor:
        u, gate = self.in_proj(x).chunk(2, dim=-1)
        u = functional.silu(self.conv1d(u.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))
        step, b, c = self.x_proj(u).split(self.splits, dim=-1)
        y = scan(u, functional.softplus(self.dt_proj(step)), -self.A_log.exp(), b, c, self.D)
        out: Tensor = self.out_proj(y * functional.silu(gate))
        return out if offset is None else out + offset


class CentredMixer(nn.Module):
    """The parameters of MambaVision's mixer: half of the channels are scanned, the others stand beside the scan."""

    def __init__(self, width: int = 16, state: int = 4) -> None:
        super().__init__()
        inner, self.rank, self.state = width // 2, 2, state
        self.in_proj = nn.Linear(width, width, bias=False)
        self.conv1d_x = nn.Conv1d(inner, inner, 3, groups=inner, padding="same", bias=False)
        self.conv1d_z = nn.Conv1d(inner, inner, 3, groups=inner, padding="same", bias=False)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.arange(1.0, state + 1).repeat(inner, 1).log())
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        u, beside = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
        u = functional.silu(self.conv1d_x(u)).transpose(1, 2)
        beside = functional.silu(self.conv1d_z(beside)).transpose(1, 2)
        step, b, c = self.x_proj(u).split([self.rank, self.state, self.state], dim=-1)
        delta = functional.softplus(self.dt_proj(step) + self.dt_proj.bias)  # the authors add the bias twice
        out: Tensor = self.out_proj(torch.cat((scan(u, delta, -self.A_log.exp(), b, c, self.D), beside), dim=-1))
        return out


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = Mixer(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        out: Tensor = x + self.mlp(x)
        return out


class Classifier(nn.Module):
    """Tokens (B, L, 8) to logits (B, 5); `read` says which tokens the head sees: the mean of all, or one place."""

    def __init__(self, width: int = 16, depth: int = 3, read: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 5)
        self.read = read

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x.mean(dim=1) if self.read is None else x[:, self.read])
        return logits


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Equal but for sums in float32 in another order."""
    return torch.allclose(found, expected, atol=tolerance, rtol=tolerance)


def mixer_of(model: nn.Module, number: int) -> Mixer:
    """That of a layer of a Classifier."""
    mixer = model.get_submodule(f"layers.{number}.mixer")
    assert isinstance(mixer, Mixer)
    return mixer


def classifier(**options: int | None) -> Classifier:
    """The same weights every time, spread so that tokens differ in what they say."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Classifier(**options).eval()  # type: ignore[arg-type]
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "A_log" not in name:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


def saved_and_loaded(model: nn.Module) -> nn.Module:
    """A copy by way of a file: the whole module, as some people save it."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


class SS2D(nn.Module):
    """Four scans over a grid: the parameters of VMamba, VM-UNet, MedMamba.

    gated   half of the input projection is a gate (v0)
    first   takes and gives (B, d, H, W), as VMamba v2 does, in place of (B, H, W, d)
    atrous  each scan visits every second row and column only (EfficientVMamba)
    """

    def __init__(self, width: int = 8, *, gated: bool = True, first: bool = False, atrous: bool = False) -> None:
        super().__init__()
        inner, state, rank = 2 * width, 4, 2
        self.channel_first, self.atrous, self.sizes = first, atrous, (rank, state)
        self.in_proj = nn.Linear(width, 2 * inner if gated else inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=gated)
        self.act = nn.SiLU()
        self.x_proj_weight = nn.Parameter(0.3 * torch.randn(4, rank + 2 * state, inner))
        self.dt_projs_weight = nn.Parameter(0.3 * torch.randn(4, inner, rank))
        self.dt_projs_bias = nn.Parameter(0.3 * torch.randn(4, inner))
        self.A_logs = nn.Parameter(torch.arange(1.0, state + 1).repeat(4 * inner, 1).log())
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1) if self.channel_first else x
        inner = self.out_proj.in_features
        projected = self.in_proj(x)
        u, gate = projected[..., :inner], projected[..., inner:]
        u = self.act(self.conv2d(u.permute(0, 3, 1, 2)))  # (B, E, H, W)
        y = torch.zeros_like(u)
        for number, (turned, backwards) in enumerate(((0, 0), (1, 0), (0, 1), (1, 1))):
            rows, columns = slice(None), slice(None)
            if self.atrous:
                rows, columns, backwards = slice(turned, None, 2), slice(backwards, None, 2), 0
            part, into = u[:, :, rows, columns], y[:, :, rows, columns]
            part, into = (each.transpose(2, 3) if turned else each for each in (part, into))
            tokens = part.flatten(2).transpose(1, 2)  # (B, L, E)
            tokens = tokens.flip(1) if backwards else tokens
            scanned = self._scan(tokens, number)
            scanned = scanned.flip(1) if backwards else scanned
            into += scanned.transpose(1, 2).unflatten(2, part.shape[2:])
        out: Tensor = self.out_norm(y.permute(0, 2, 3, 1))
        out = self.out_proj(out * self.act(gate) if gate.shape[-1] else out)
        return out.permute(0, 3, 1, 2) if self.channel_first else out

    def _scan(self, u: Tensor, number: int) -> Tensor:
        rank, state = self.sizes
        step, b, c = functional.linear(u, self.x_proj_weight[number]).split([rank, state, state], dim=-1)
        delta = functional.softplus(functional.linear(step, self.dt_projs_weight[number], self.dt_projs_bias[number]))
        rates, skips = -self.A_logs.exp().unflatten(0, (4, -1)), self.Ds.unflatten(0, (4, -1))
        return scan(u, delta, rates[number], b, c, skips[number])
