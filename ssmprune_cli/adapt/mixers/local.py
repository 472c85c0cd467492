"""LocalMamba's mixers: `MultiMamba` of LocalVim over tokens, and `SS2D` of LocalVMamba over a grid.

Source: hunto/LocalMamba 75e5d1f (classification/lib/models/mamba/multi_mamba.py, local_vmamba.py). Which way each scan
takes through the grid is in no weight: a search chose it, and `multi_scan.choices` has it. Every output goes through
one gate over channels, `attn`. Letters: B batch, L tokens, d model width, E inner channels, N state, R rank of the step
projection, K convolution width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ssmprune_cli.adapt.mixers.base import (
    SIZES,
    Form,
    SequenceForm,
    Shape,
    Unrecognised,
    bare,
    bias_of,
    check_conv,
    check_names,
    check_shapes,
    check_silu,
    check_types,
    parameters_of,
    rank_of,
)
from ssmprune_cli.adapt.mixers.ss2d import NEEDED as GRID_NEEDED
from ssmprune_cli.adapt.mixers.ss2d import POSSIBLE as GRID_POSSIBLE
from ssmprune_cli.adapt.mixers.ss2d import GridForm, grid_form
from ssmprune_cli.errors import UsageError, listing
from ssmprune_cli.grids import Grid
from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models import (
    DIRECTION,
    CausalConv1d,
    ChannelGate,
    LocalMixer,
    LocalVMambaMixer,
    RouteProjections,
    StepProjection,
)
from ssmprune_cli.tokens import TokenSequence

GATE = (
    *("norm.weight", "norm.bias", "global_reduce.weight", "global_reduce.bias"),
    *("channel_select.weight", "channel_select.bias"),
)
BRANCH = ("A_log", "D", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "dt_proj.bias")
NEEDED = ("in_proj.weight", "out_proj.weight", *(f"attn.{name}" for name in GATE))
POSSIBLE = ("out_proj.bias",)
LOCAL_GRID_NEEDED = (*GRID_NEEDED, *(f"multi_scan.attn.{name}" for name in GATE))


def routes_of(module: nn.Module) -> tuple[str, ...]:
    """The way of each scan, such as `w2_flip`. Raises Unrecognised if the module does not say it."""
    choices = getattr(getattr(module, "multi_scan", None), "choices", None)
    if not isinstance(choices, list | tuple) or not choices:
        raise Unrecognised("its scan directions, which no shape tells, are in no list `multi_scan.choices`")
    if unknown := [str(each) for each in choices if not (isinstance(each, str) and DIRECTION.fullmatch(each))]:
        raise Unrecognised(f"no scan that is known here has the direction {listing(unknown)}")
    return tuple(choices)


def _check_routes(module: nn.Module, routes: tuple[str, ...]) -> None:
    """UsageError if they are other ones than when the mixer was recognised: what was calibrated is for those."""
    scan: Any = module.multi_scan
    now = tuple(scan.choices)
    if now != routes:
        raise UsageError(
            f"its scan directions were {listing(routes)} and have become {listing(now)}",
            where=type(module).__name__,
            hint="`restore` the model, and begin again.",
        )


def _gate(module: nn.Module) -> ChannelGate:
    return bare(ChannelGate, norm=module.norm, global_reduce=module.global_reduce, channel_select=module.channel_select)


def _check_gate(gate: nn.Module, channels: int) -> None:
    check_types(gate, {"norm": nn.LayerNorm, "global_reduce": nn.Linear, "channel_select": nn.Linear})
    values = parameters_of(gate)
    reduced = values["global_reduce.weight"].shape[0]
    check_shapes(
        values,
        {
            "norm.weight": (channels,),
            "global_reduce.weight": (reduced, channels),
            "channel_select.weight": (channels, reduced),
        },
    )


@dataclass(frozen=True)
class LocalGridForm(GridForm):
    """Of LocalVMamba. `routes` are the directions when it was recognised."""

    routes: tuple[str, ...]

    def parts(self, module: nn.Module) -> dict[str, object]:
        gate = _gate(module.get_submodule("multi_scan.attn"))
        return {
            "directions": self.directions,
            "routes": self.routes,
            "projections": RouteProjections(),
            "multi_scan": nn.ModuleDict({"attn": gate}),
        }

    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        _check_routes(module, self.routes)
        # A token that has to stay has its place in the grid all the same.
        return super().scan(module, x, replace(sequence, protected=()), alignment, wanted, context)


def recognise_local_grid(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    values = parameters_of(module)
    check_names(values, LOCAL_GRID_NEEDED, GRID_POSSIBLE)
    routes = routes_of(module)
    own = {name: value for name, value in values.items() if not name.startswith("multi_scan.")}
    form = grid_form(module, own, "LocalVMamba's SS2D", LocalVMambaMixer, len(routes))
    if form.layout != "grid" or not form.gated:
        raise Unrecognised("it takes images with the channels first, or has no gate")
    _check_gate(module.get_submodule("multi_scan.attn"), form.d_inner)
    sizes = {name: getattr(form, name) for name in ("kind", "layout", "d_model", "d_inner", "directions")}
    bypassed = ("conv2d", "multi_scan", "multi_scan.attn")
    return LocalGridForm(**sizes, bypassed=bypassed, mixer=LocalVMambaMixer, gated=True, routes=routes)


@dataclass(frozen=True)
class LocalForm(SequenceForm):
    """Of LocalVim. `splits` are the channels of each x_proj: R, N and N."""

    splits: tuple[int, int, int]
    d_conv: int
    routes: tuple[str, ...]

    def view(self, module: nn.Module) -> LocalMixer:
        branches: dict[str, object] = {}
        for number in range(self.directions):
            conv, step = getattr(module, f"conv1d_{number}"), getattr(module, f"dt_proj_{number}")
            branches |= {
                f"conv1d_{number}": bare(CausalConv1d, weight=conv.weight, bias=bias_of(conv)),
                f"x_proj_{number}": getattr(module, f"x_proj_{number}"),
                f"dt_proj_{number}": bare(StepProjection, weight=step.weight, bias=step.bias),
                f"A_log_{number}": getattr(module, f"A_log_{number}"),
                f"D_{number}": getattr(module, f"D_{number}"),
            }
        return bare(
            LocalMixer,
            d_model=self.d_model,
            d_inner=self.d_inner,
            directions=self.directions,
            d_conv=self.d_conv,
            routes=self.routes,
            splits=list(self.splits),
            gamma=None,
            in_proj=module.in_proj,
            out_proj=module.out_proj,
            attn=_gate(module.get_submodule("attn")),
            **branches,
        )

    def scan(
        self,
        module: nn.Module,
        x: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        _check_routes(module, self.routes)
        grid, middle = _token_size(module), _middle(module)
        if math.prod(grid) + middle != sequence.length:
            more = " and a class token" if middle else ""
            raise UsageError(
                f"has a `token_size` of {grid[0]} x {grid[1]}{more}, and is given {sequence.length} tokens",
                where=type(module).__name__,
                hint="Set `multi_scan.token_size` of each mixer to the grid of the input.",
            )
        # Only the class token has no place in the grid, whatever else has to stay.
        beside = ((sequence.length - 1) // 2,) if middle else ()
        return super().scan(module, x, replace(sequence, protected=beside, grid=grid), alignment, wanted, context)

    def input_size(self, module: nn.Module) -> Shape:
        """Of a grid that windows do not fill. `module` is a copy, and is told so."""
        samples, *grid = SIZES["grid"]
        module.multi_scan.token_size = tuple(grid)  # type: ignore[union-attr]
        return (samples, math.prod(grid) + _middle(module))


def _token_size(module: nn.Module) -> Grid:
    scan: Any = module.multi_scan
    rows, columns = scan.token_size
    return rows, columns


def _middle(module: nn.Module) -> int:
    """Tokens that are not of the grid: one in the middle of the sequence, or none."""
    return int(bool(getattr(module, "use_middle_cls_token", False)))


def recognise_local(module: nn.Module) -> Form:
    """Raises Unrecognised with the reason."""
    values = parameters_of(module)
    if "A_log_0" not in values:
        raise Unrecognised("it has no A_log_0")
    routes = routes_of(module)
    check_names(
        values,
        (*NEEDED, *(numbered(name, number) for number in range(len(routes)) for name in BRANCH)),
        (*POSSIBLE, *(f"conv1d_{number}.bias" for number in range(len(routes)))),
    )
    layers = {"in_proj": nn.Linear, "out_proj": nn.Linear}
    for number in range(len(routes)):
        layers |= {f"x_proj_{number}": nn.Linear, f"dt_proj_{number}": nn.Linear}
    check_types(module, layers)
    if values["A_log_0"].ndim != 2:
        raise Unrecognised(f"A_log_0 has shape {tuple(values['A_log_0'].shape)}, not (channels, states)")
    inner, state = values["A_log_0"].shape
    width, d_conv = values["in_proj.weight"].shape[1], values["conv1d_0.weight"].shape[-1]
    rank = rank_of(values["x_proj_0.weight"].shape[0], state)
    check_shapes(values, {"in_proj.weight": (2 * inner, width), "out_proj.weight": (width, inner)})
    for number in range(len(routes)):
        check_shapes(values, _branch_shapes(number, inner, state, rank, d_conv))
        conv = module.get_submodule(f"conv1d_{number}")
        if not isinstance(conv, nn.Conv1d):
            raise Unrecognised(f"conv1d_{number} is a {type(conv).__name__}")
        check_conv(conv, inner, d_conv - 1)
    check_silu(module)
    _check_gate(module.get_submodule("attn"), inner)
    bypassed = [f"{layer}_{number}" for number in range(len(routes)) for layer in ("conv1d", "dt_proj")]
    return LocalForm(
        kind="LocalVim",
        layout="tokens",
        d_model=width,
        d_inner=inner,
        directions=len(routes),
        bypassed=(*bypassed, "multi_scan", "attn"),
        splits=(rank, state, state),
        d_conv=d_conv,
        routes=routes,
    )


def _branch_shapes(number: int, inner: int, state: int, rank: int, d_conv: int) -> Mapping[str, Shape]:
    shapes = {
        "A_log": (inner, state),
        "D": (inner,),
        "conv1d.weight": (inner, 1, d_conv),
        "x_proj.weight": (rank + 2 * state, inner),
        "dt_proj.weight": (inner, rank),
        "dt_proj.bias": (inner,),
    }
    return {numbered(name, number): shape for name, shape in shapes.items()}


def numbered(name: str, number: int | str) -> str:
    """`conv1d.weight` of one direction: `conv1d_0.weight`."""
    return re.sub(r"^\w+", lambda found: f"{found[0]}_{number}", name)
