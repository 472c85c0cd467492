"""The Mamba-1 mixer as it is written in mamba_ssm (`Mamba`), mamba-minimal and mambapy (`MambaBlock`), transformers
(`MambaMixer`, `FalconMambaMixer`, `JambaMambaMixer`): all have the same parameters.

Sources: state-spaces/mamba e9594ce (modules/mamba_simple.py), transformers 5.24, mambapy 1.2. Some normalise the step,
B and C before they are used; those norms are called as they are. Letters: B batch, L tokens, d model width, E inner
channels, N state, R rank of the step projection, K convolution width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmprune_cli.adapt.mixers.base import (
    Form,
    SequenceForm,
    Unrecognised,
    bare,
    bias_of,
    check_conv,
    check_names,
    check_shapes,
    check_silu,
    check_types,
    parameters_of,
    part_of,
    rank_of,
)
from ssmprune_cli.models import CausalConv1d, MambaMixer, StepProjection

NEEDED = (
    *("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
    *("A_log", "D", "out_proj.weight"),
)
BIASES = ("in_proj.bias", "conv1d.bias", "out_proj.bias")
NORMS = (("dt_layernorm", "B_layernorm", "C_layernorm"), ("dt_layernorm", "b_layernorm", "c_layernorm"))


class _NormedProjection(nn.Module):
    """The projection to step, B and C, with a norm behind each."""

    layer: nn.Module
    norms: tuple[nn.Module, ...]
    splits: list[int]

    def forward(self, u: Tensor) -> Tensor:
        parts = self.layer(u).split(self.splits, dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self.norms, parts, strict=True)], dim=-1)


class _View(MambaMixer):
    """Our mixer over the weights of another module, made for one call."""

    def _inner(self, x: Tensor) -> Tensor:
        return part_of(self.in_proj, x, slice(self.d_inner))


@dataclass(frozen=True)
class MambaForm(SequenceForm):
    """`splits` are the channels of x_proj: R, N and N; `norms` the names of the norms behind them, if there are any."""

    splits: tuple[int, int, int]
    d_conv: int
    norms: tuple[str, ...]

    def view(self, module: nn.Module) -> MambaMixer:
        conv, step = module.conv1d, module.dt_proj
        assert isinstance(conv, nn.Conv1d) and isinstance(step, nn.Linear)
        x_proj, splits = module.x_proj, list(self.splits)
        if self.norms:
            norms = tuple(module.get_submodule(name) for name in self.norms)
            x_proj = bare(_NormedProjection, layer=x_proj, norms=norms, splits=splits)
        return bare(
            _View,
            kind="none",
            scale=1.0,
            d_model=self.d_model,
            d_inner=self.d_inner,
            directions=1,
            d_conv=self.d_conv,
            splits=splits,
            gamma=None,
            in_proj=module.in_proj,
            conv1d=bare(CausalConv1d, weight=conv.weight, bias=bias_of(conv)),
            x_proj=x_proj,
            dt_proj=bare(StepProjection, weight=step.weight, bias=step.bias),
            A_log=module.A_log,
            D=module.D,
            out_proj=module.out_proj,
        )


def recognise_mamba(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    values = parameters_of(module)
    norms = next((each for each in NORMS if all(getattr(module, name, None) is not None for name in each)), ())
    check_names(values, NEEDED, (*BIASES, *(f"{name}.weight" for name in norms)))
    check_types(
        module,
        {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "x_proj": nn.Linear, "dt_proj": nn.Linear, "out_proj": nn.Linear},
    )
    if values["A_log"].ndim != 2:
        raise Unrecognised(f"A_log has shape {tuple(values['A_log'].shape)}, not (channels, states)")
    inner, state = values["A_log"].shape
    width, d_conv = values["in_proj.weight"].shape[1], values["conv1d.weight"].shape[-1]
    rank = rank_of(values["x_proj.weight"].shape[0], state)
    check_shapes(
        values,
        {
            "in_proj.weight": (2 * inner, width),
            "conv1d.weight": (inner, 1, d_conv),
            "x_proj.weight": (rank + 2 * state, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "D": (inner,),
            "out_proj.weight": (width, inner),
        },
    )
    check_silu(module)
    conv = module.conv1d
    assert isinstance(conv, nn.Conv1d)
    check_conv(conv, inner, d_conv - 1)
    return MambaForm(
        "Mamba", "tokens", width, inner, 1, ("conv1d", "dt_proj"), (rank, state, state), d_conv, tuple(norms)
    )
