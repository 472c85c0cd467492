"""The mixer of LocalVim: scans over windows of the grid, each with a branch and a gate of its own.

Written from hunto/LocalMamba 75e5d1f (classification/lib/models/mamba/multi_mamba.py), with the authors' parameter
names. Letters: B batch, L tokens now, d model width, E inner channels, N state.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import ScanAlignment, ScanStatistics, Wanted
from ssmprune_cli.models.common import ChannelGate, inflow
from ssmprune_cli.models.mamba.local_routes import scan_path
from ssmprune_cli.models.mamba.mixer import Branch, BranchMixer, CausalConv1d, StepProjection, s4d_real
from ssmprune_cli.tokens import TokenSequence


class LocalMixer(BranchMixer):
    """The mixer of a block, with a branch for each of `routes`: see local_routes. All outputs go through one gate."""

    def __init__(
        self, dim: int, *, d_inner: int, d_state: int, d_conv: int, dt_rank: int, routes: Sequence[str]
    ) -> None:
        super().__init__()
        self.d_model, self.d_inner = dim, d_inner
        self.routes = tuple(routes)
        self.directions = len(self.routes)
        self.d_state, self.d_conv = d_state, d_conv
        self.splits = [dt_rank, d_state, d_state]
        self.gamma = None
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False)
        layers = ("conv1d", "x_proj", "dt_proj")
        self.per_direction = (*(f"{layer}_{number}" for number in range(self.directions) for layer in layers), "attn")
        for number in range(self.directions):
            self.register_parameter(f"A_log_{number}", nn.Parameter(s4d_real(d_inner, d_state)))
            self.register_parameter(f"D_{number}", nn.Parameter(torch.ones(d_inner)))
            self.add_module(f"conv1d_{number}", CausalConv1d(d_inner, d_conv))
            self.add_module(f"x_proj_{number}", nn.Linear(d_inner, sum(self.splits), bias=False))
            self.add_module(f"dt_proj_{number}", StepProjection(dt_rank, d_inner))
        self.out_proj = nn.Linear(d_inner, dim, bias=False)
        self.attn = ChannelGate(d_inner)

    def mix(
        self,
        xz: Tensor,
        sequence: TokenSequence,
        alignment: ScanAlignment | None,
        wanted: Wanted,
        frozen: Tensor | None,
        context: Tensor | None,
    ) -> tuple[Tensor, ScanStatistics]:
        x, z = xz.chunk(2, dim=-1)  # (B, L, E) each
        gate, outputs, deltas = functional.silu(z), [], []
        for direction, (route, branch) in enumerate(zip(self.routes, self.branches(), strict=True)):
            way = scan_path(sequence, route)
            flow = inflow(way.sequence, way.along(x), frozen, alignment)
            projected = self.project(flow, context, branch, reverse=False)
            y, delta = self.scan_branch(flow, direction, branch, projected, wanted, reverse=False)
            outputs.append(way.home(y))
            if delta is not None:
                deltas.append(way.home(delta))
        mixed = self.merge([y * gate for y in outputs], sequence)
        return mixed, ScanStatistics(tuple(outputs), tuple(deltas))

    def merge(self, outputs: Sequence[Tensor], sequence: TokenSequence) -> Tensor:
        """The sum of what the gate leaves of each direction's output, (B, L, E) at the tokens' own places."""
        total: Tensor = reduce(add, (self.attn(each, sequence) for each in outputs))
        return total

    def branches(self) -> list[Branch]:
        return [
            Branch(
                getattr(self, f"conv1d_{number}"),
                getattr(self, f"x_proj_{number}"),
                getattr(self, f"dt_proj_{number}"),
                getattr(self, f"A_log_{number}"),
                getattr(self, f"D_{number}"),
            )
            for number in range(self.directions)
        ]
