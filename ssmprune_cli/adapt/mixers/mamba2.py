"""The Mamba-2 mixer of mamba_ssm (`Mamba2`) and transformers (`Mamba2Mixer`).

Sources: state-spaces/mamba e9594ce (modules/mamba2.py), transformers 5.24. A head has one A and one
step. The convolution covers B and C too. The score's y is the scan's output before the
gated norm. Letters: B batch, L tokens, d model width, E inner channels, H heads, G groups of heads that share B and C,
P channels of a head, N state, K convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.adapt.mixers.base import (
    Form,
    Unrecognised,
    bias_of,
    check_conv,
    check_names,
    check_shapes,
    check_silu,
    check_types,
    parameters_of,
    part_of,
)
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.kernels import causal_conv1d, sparse_conv1d, ssd_scan
from ssmprune_cli.models import channels_last_taps, conv_sources, decay_rates
from ssmprune_cli.tokens import TokenSequence

NEEDED = ("in_proj.weight", "conv1d.weight", "dt_bias", "A_log", "D", "norm.weight", "out_proj.weight")
BIASES = ("in_proj.bias", "conv1d.bias", "out_proj.bias")


@dataclass(frozen=True)
class Mamba2Form(Form):
    """heads, groups, d_state, d_conv: H, G, N and K

    eps          of the gated norm, over `norm_groups` groups of channels
    norm_first   whether the norm comes before the gate
    step_limits  the least and the largest step, after softplus
    """

    heads: int
    groups: int
    d_state: int
    d_conv: int
    eps: float
    norm_groups: int
    norm_first: bool
    step_limits: tuple[float, float]

    @property
    def splits(self) -> list[int]:
        """Rows of the input projection: gate, what is convolved, raw steps."""
        return [self.d_inner, self.d_inner + 2 * self.groups * self.d_state, self.heads]

    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        gate, values, raw_step = module.get_submodule("in_proj")(x).split(self.splits, dim=-1)
        convolved = self._convolve(module, values, sequence, context)
        u, b, c = convolved.split([self.d_inner, *[self.groups * self.d_state] * 2], dim=-1)
        step = self._steps(raw_step, module.get_parameter("dt_bias")).to(u.dtype)  # (B, L, H)
        y = self._scan(module, u, step, b, c, sequence, alignment)
        mixed: Tensor = module.get_submodule("out_proj")(self._gated_norm(module, y, gate).to(x.dtype))
        return mixed, ScanStatistics((y,), (self._by_channel(step),) if wanted == "delta" else ())

    def null_delta(self, module: nn.Module) -> Tensor:
        bias = module.get_parameter("dt_bias")
        return self._by_channel(self._steps(torch.zeros_like(bias), bias))[None]

    def _convolve(self, module: nn.Module, values: Tensor, sequence: TokenSequence, context: Tensor | None) -> Tensor:
        """silu(convolution) of u, B and C together, (B, L, E + 2 G N)."""
        conv, into = module.get_submodule("conv1d"), module.get_submodule("in_proj")
        assert isinstance(conv, nn.Conv1d) and isinstance(into, nn.Linear)
        taps = channels_last_taps(conv.weight)
        bias = bias_of(conv)
        values = values.contiguous()
        if context is None:
            return causal_conv1d(values, taps, bias)
        rows = slice(self.splits[0], self.splits[0] + self.splits[1])
        seen = part_of(into, context, rows)
        return sparse_conv1d(values, seen, conv_sources(sequence, self.d_conv)[0], taps, bias)

    def _steps(self, raw: Tensor, bias: Tensor) -> Tensor:
        """(..., H) in float32 at least."""
        exact = torch.promote_types(raw.dtype, torch.float32)
        return functional.softplus(raw.to(exact) + bias.to(exact)).clamp(*self.step_limits)

    def _by_channel(self, values: Tensor) -> Tensor:
        """(..., H) to (..., E)."""
        return values.repeat_interleave(self.d_inner // self.heads, dim=-1)

    def _scan(
        self,
        module: nn.Module,
        u: Tensor,
        step: Tensor,
        b: Tensor,
        c: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
    ) -> Tensor:
        """y (B, L, E), from `step` (B, L, H)."""
        gap = gap_delta = None
        if alignment is not None:
            gap, gap_delta, _ = alignment.steps(0, sequence.gaps(reverse=False), None)
        if gap_delta is not None:
            gap_delta = gap_delta.unflatten(0, (self.heads, -1))[:, 0].contiguous()  # a head's channels share a step
        skips = module.get_parameter("D")
        by_head = skips.numel() == self.heads
        y, _ = ssd_scan(
            u.unflatten(-1, (self.heads, -1)).contiguous(),  # (B, L, H, P)
            step.contiguous(),
            decay_rates(module.get_parameter("A_log")),
            b.unflatten(-1, (self.groups, self.d_state)).contiguous(),
            c.unflatten(-1, (self.groups, self.d_state)).contiguous(),
            skips if by_head else None,
            dt_softplus=False,
            gap=gap,
            gap_delta=gap_delta,
        )
        y = y.flatten(2)
        return y if by_head else y + u * skips.to(y.dtype)

    def _gated_norm(self, module: nn.Module, y: Tensor, gate: Tensor) -> Tensor:
        """(B, L, E): the root mean square of each group becomes 1, and the gate is applied before or after."""
        exact = torch.promote_types(y.dtype, torch.float32)
        y, gate = y.to(exact), functional.silu(gate.to(exact))
        if not self.norm_first:
            y = y * gate
        parts = y.unflatten(-1, (self.norm_groups, -1))
        unit = parts * torch.rsqrt(parts.square().mean(dim=-1, keepdim=True) + self.eps)
        normed: Tensor = unit.flatten(-2) * module.get_parameter("norm.weight").to(exact)
        return normed * gate if self.norm_first else normed


def recognise_mamba2(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    values = parameters_of(module)
    check_names(values, NEEDED, BIASES)
    check_types(module, {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "out_proj": nn.Linear})
    heads, (width, inner) = values["A_log"].numel(), values["out_proj.weight"].shape
    state = _number(module, "ssm_state_size", "d_state")
    groups = _number(module, "n_groups", "ngroups")
    convolved, d_conv = inner + 2 * groups * state, values["conv1d.weight"].shape[-1]
    if heads == 0 or inner % heads or heads % groups:
        raise Unrecognised(f"{heads} heads in {groups} groups do not share {inner} channels evenly")
    skips = values["D"].numel()
    check_shapes(
        values,
        {
            "in_proj.weight": (inner + convolved + heads, width),
            "conv1d.weight": (convolved, 1, d_conv),
            "dt_bias": (heads,),
            "A_log": (heads,),
            "D": (inner,) if skips == inner else (heads,),
            "norm.weight": (inner,),
        },
    )
    check_silu(module)
    conv, norm = module.get_submodule("conv1d"), module.get_submodule("norm")
    assert isinstance(conv, nn.Conv1d)
    check_conv(conv, convolved, d_conv - 1)
    size = getattr(norm, "group_size", None) or inner
    limits = getattr(module, "time_step_limit", getattr(module, "dt_limit", (0.0, float("inf"))))
    return Mamba2Form(
        kind="Mamba-2",
        layout="tokens",
        d_model=width,
        d_inner=inner,
        directions=1,
        bypassed=("conv1d", "norm"),
        heads=heads,
        groups=groups,
        d_state=state,
        d_conv=d_conv,
        eps=_eps(norm),
        norm_groups=inner // size,
        norm_first=bool(getattr(norm, "norm_before_gate", False)),
        step_limits=(float(limits[0]), float(limits[1])),
    )


def _number(module: nn.Module, *names: str) -> int:
    """The first of these attributes: no shape tells it."""
    for name in names:
        value: Any = getattr(module, name, None)
        if isinstance(value, int) and value > 0:
            return value
    raise Unrecognised(f"it has no attribute {' or '.join(names)}, which no shape tells")


def _eps(norm: nn.Module) -> float:
    for name in ("variance_epsilon", "eps"):
        if isinstance(value := getattr(norm, name, None), float):
            return value
    raise Unrecognised("its norm has no attribute eps or variance_epsilon")
