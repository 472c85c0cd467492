"""MambaVision's mixer: half of its channels are scanned, the other half stands beside the scan.

Source: the layout of NVlabs/MambaVision's checkpoints; see our models/mambavision, which computes it. Letters: d model
width, E channels of the scan (d / 2), N state, R rank of the step projection.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ssmprune_cli.adapt.mixers.base import (
    Form,
    SequenceForm,
    Unrecognised,
    bare,
    check_conv,
    check_names,
    check_shapes,
    check_silu,
    check_types,
    parameters_of,
    rank_of,
)
from ssmprune_cli.models import CentredMixer, StepProjection

NEEDED = (
    *("in_proj.weight", "conv1d_x.weight", "conv1d_z.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
    *("A_log", "D", "out_proj.weight"),
)
TAPS = 3


@dataclass(frozen=True)
class CentredForm(SequenceForm):
    """`splits` are the channels of x_proj: R, N and N."""

    splits: tuple[int, int, int]

    def view(self, module: nn.Module) -> CentredMixer:
        step = module.get_submodule("dt_proj")
        return bare(
            CentredMixer,
            d_model=self.d_model,
            d_inner=self.d_inner,
            splits=list(self.splits),
            in_proj=module.in_proj,
            x_proj=module.x_proj,
            dt_proj=bare(StepProjection, weight=step.weight, bias=step.bias),
            A_log=module.A_log,
            D=module.D,
            out_proj=module.out_proj,
            conv1d_x=module.conv1d_x,
            conv1d_z=module.conv1d_z,
        )


def recognise_mambavision(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    values = parameters_of(module)
    check_names(values, NEEDED)
    check_types(module, dict.fromkeys(("in_proj", "x_proj", "dt_proj", "out_proj"), nn.Linear))
    if values["A_log"].ndim != 2:
        raise Unrecognised(f"A_log has shape {tuple(values['A_log'].shape)}, not (channels, states)")
    inner, state = values["A_log"].shape
    rank = rank_of(values["x_proj.weight"].shape[0], state)
    check_shapes(
        values,
        {
            "in_proj.weight": (2 * inner, 2 * inner),
            "conv1d_x.weight": (inner, 1, TAPS),
            "conv1d_z.weight": (inner, 1, TAPS),
            "x_proj.weight": (rank + 2 * state, inner),
            "dt_proj.weight": (inner, rank),
            "dt_proj.bias": (inner,),
            "D": (inner,),
            "out_proj.weight": (2 * inner, 2 * inner),
        },
    )
    check_silu(module)
    for name in ("conv1d_x", "conv1d_z"):
        conv = module.get_submodule(name)
        if not isinstance(conv, nn.Conv1d):
            raise Unrecognised(f"{name} is a {type(conv).__name__}")
        check_conv(conv, inner, None)
    bypassed = ("conv1d_x", "conv1d_z", "dt_proj")
    return CentredForm("MambaVision", "tokens", 2 * inner, inner, 1, bypassed, (rank, state, state))
