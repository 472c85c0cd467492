"""The gate over channels of LocalVim (hunto/LocalMamba 75e5d1f) and EfficientVMamba (TerryPei/EfficientVMamba 0bc5ee2).

Letters: B batch, L tokens now, E channels.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.tokens import TokenSequence

GATE_REDUCTION = 8  # channels of the gate's inside: one for so many of its input


class ChannelGate(nn.Module):
    """A factor from 0 to 1 for each channel, by the mean of the normalised tokens ("BiAttn")."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.global_reduce = nn.Linear(channels, channels // GATE_REDUCTION)
        self.channel_select = nn.Linear(channels // GATE_REDUCTION, channels)
        for layer in (self.global_reduce, self.channel_select):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, sequence: TokenSequence) -> Tensor:
        """`x` (B, L, E) of the tokens of `sequence`, times the factors. A merged token counts as all it stands for."""
        mean = sequence.mean(self.norm(x))  # (B, E)
        factors: Tensor = self.channel_select(functional.gelu(self.global_reduce(mean))).sigmoid()
        return x * factors[:, None]
