"""Mixers that scan a grid in four directions: `SS2D` of VMamba, and what VM-UNet, MedMamba and others took from it.

Sources: MzeroMiko/VMamba 2ed52ea (forward types `v0`, `v05` with and without a gate), TerryPei/EfficientVMamba 0bc5ee2
(its scans visit every second row and column: the same parameters). What tells the two apart is the proof. Letters:
B batch, L tokens, d model width, E inner channels, N state, R rank of the step projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ssmprune_cli.adapt.mixers.base import (
    Form,
    Layout,
    Unrecognised,
    bare,
    check_conv,
    check_names,
    check_shapes,
    check_silu,
    parameters_of,
    rank_of,
)
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import AtrousMixer, DirectionProjections, VMambaMixer
from ssmprune_cli.tokens import TokenSequence

NEEDED = (
    *("in_proj.weight", "conv2d.weight", "x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds"),
    *("out_norm.weight", "out_norm.bias", "out_proj.weight"),
)
POSSIBLE = ("conv2d.bias",)


@dataclass(frozen=True)
class GridForm(Form):
    """`mixer` is which of our mixers computes it. A layer may be a 1x1 convolution of an image: its weight is read."""

    mixer: type[VMambaMixer]
    gated: bool

    def view(self, module: nn.Module) -> VMambaMixer:
        norm = module.get_submodule("out_norm")
        assert isinstance(norm, nn.LayerNorm)
        as_tokens = self.layout == "image"
        return bare(
            self.mixer,
            d_model=self.d_model,
            d_inner=self.d_inner,
            gated=self.gated,
            **self.parts(module),
            in_proj=_linear(module, "in_proj") if as_tokens else module.in_proj,
            conv2d=module.conv2d,
            **{name: module.get_parameter(name) for name in NEEDED if "." not in name},
            out_norm=bare(
                nn.LayerNorm,
                normalized_shape=norm.normalized_shape,
                eps=norm.eps,
                elementwise_affine=True,
                weight=norm.weight,
                bias=norm.bias,
            )
            if as_tokens
            else norm,
            out_proj=_linear(module, "out_proj") if as_tokens else module.out_proj,
        )

    def parts(self, module: nn.Module) -> dict[str, object]:
        """What this mixer has and others do not."""
        return {"projections": DirectionProjections()}

    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        return self.view(module).forward(x, sequence, sequence.patch_grid, alignment, wanted, None, context)

    def null_delta(self, module: nn.Module) -> Tensor:
        return self.view(module).null_delta()


def _linear(module: nn.Module, name: str) -> nn.Linear:
    """The layer as one over channels-last tokens. None of these layers has a bias."""
    return bare(nn.Linear, weight=module.get_parameter(f"{name}.weight").flatten(1), bias=None)


def recognise_ss2d(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    return _recognise(module, "SS2D", VMambaMixer)


def recognise_atrous(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    return _recognise(module, "EfficientVMamba's SS2D", AtrousMixer)


def _recognise(module: nn.Module, kind: str, mixer: type[VMambaMixer]) -> Form:
    values = parameters_of(module)
    check_names(values, NEEDED, POSSIBLE)
    return grid_form(module, values, kind, mixer, mixer.directions)


def grid_form(
    module: nn.Module, values: Mapping[str, Tensor], kind: str, mixer: type[VMambaMixer], directions: int
) -> GridForm:
    """Of a module with these parameters, whose names have been checked. Raises Unrecognised with the reason."""
    if values["A_logs"].ndim != 2 or values["x_proj_weight"].ndim != 3:
        raise Unrecognised("A_logs or x_proj_weight has not the shape of several directions")
    rows, state = values["A_logs"].shape
    inner = rows // directions
    channels, width = values["in_proj.weight"].shape[:2]
    rank = rank_of(values["x_proj_weight"].shape[1], state)
    taps = values["conv2d.weight"].shape[-1]
    check_shapes(
        {name: value.flatten(1) if name.endswith("proj.weight") else value for name, value in values.items()},
        {
            "in_proj.weight": (2 * inner if channels == 2 * inner else inner, width),
            "conv2d.weight": (inner, 1, taps, taps),
            "conv2d.bias": (inner,),
            "x_proj_weight": (directions, rank + 2 * state, inner),
            "dt_projs_weight": (directions, inner, rank),
            "dt_projs_bias": (directions, inner),
            "A_logs": (directions * inner, state),
            "Ds": (directions * inner,),
            "out_norm.weight": (inner,),
            "out_norm.bias": (inner,),
            "out_proj.weight": (width, inner),
        },
    )
    check_silu(module)
    conv, norm = module.get_submodule("conv2d"), module.get_submodule("out_norm")
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.LayerNorm):
        raise Unrecognised(f"conv2d is a {type(conv).__name__} and out_norm a {type(norm).__name__}")
    check_conv(conv, inner, taps // 2)
    layout: Layout = "image" if getattr(module, "channel_first", False) else "grid"
    bypassed = ("conv2d",) if layout == "grid" else ("in_proj", "conv2d", "out_norm", "out_proj")
    return GridForm(kind, layout, width, inner, directions, bypassed, mixer, channels == 2 * inner)
