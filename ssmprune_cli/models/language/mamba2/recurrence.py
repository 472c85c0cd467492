"""The mixer of Mamba-2 as a recurrence. Letters: as in mixer.py."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import decay_rates
from ssmprune_cli.models.language.mamba2.mixer import Mamba2Mixer
from ssmprune_cli.models.language.recurrence import MixerState, convolved, last_inputs, next_inputs
from ssmprune_cli.tokens import TokenSequence


class Mamba2Recurrence:
    """Of one mixer."""

    def __init__(self, mixer: Mamba2Mixer) -> None:
        self.mixer = mixer

    def prefill(
        self,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics, MixerState]:
        mixer = self.mixer
        z, values = mixer.in_proj(x).split([mixer.d_inner, mixer.channels + mixer.heads], dim=-1)
        statistics, flow, state = mixer.scanned(values, sequence, alignment, wanted, frozen, context)
        mixed = mixer.out_proj(mixer.norm(statistics.y[0], z))
        inputs = flow.values[..., : mixer.channels]
        return mixed, statistics, MixerState(last_inputs(inputs, mixer.d_conv), state)

    def step(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        mixer = self.mixer
        z, value, dt = mixer.in_proj(x).split([mixer.d_inner, mixer.channels, mixer.heads], dim=-1)
        window = next_inputs(state, value)
        seen = convolved(window, mixer.conv1d.weight, mixer.conv1d.bias)
        u, b, c, dt = (each[:, 0] for each in mixer.divide(torch.cat((seen, dt), dim=-1)))
        delta = functional.softplus((dt + mixer.dt_bias).to(state.scan.dtype))  # (B, H)
        repeats = mixer.heads // mixer.groups
        b, c = (each.repeat_interleave(repeats, dim=1)[:, :, None] for each in (b, c))  # (B, H, 1, N)
        decay = torch.exp(delta * decay_rates(mixer.A_log))[..., None, None]
        scan = decay * state.scan + (delta[..., None] * u)[..., None] * b  # (B, H, P, N)
        y = (scan * c).sum(dim=-1) + mixer.D[:, None] * u
        out: Tensor = mixer.out_proj(mixer.norm(y.flatten(1)[:, None].to(x.dtype), z))
        return out, MixerState(window[:, 1:], scan)
