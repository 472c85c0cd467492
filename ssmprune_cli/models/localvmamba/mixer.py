"""LocalVMamba's mixer: VMamba's, but each block has scan routes of its own, and a gate over channels for their outputs.

Written from hunto/LocalMamba 75e5d1f (classification/lib/models/local_vmamba.py), with the authors' parameter names.
Letters: B batch, L tokens now, S steps of a scan, E inner channels, N state, R rank of the step projection. For routes,
padding and steps see models/mamba/local_routes.py: windows that do not fill the grid are padded with zeros, after the
convolution here. A route's way back (`_flip`) is a reverse scan of the route.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from ssmprune_cli.interface import ScanStatistics, Wanted
from ssmprune_cli.models.common import ChannelGate, Inflow, Visits, decay_rates, steps_of
from ssmprune_cli.models.mamba import ScanPath, scan_path
from ssmprune_cli.models.vmamba import VMambaMixer
from ssmprune_cli.tokens import TokenSequence, gather_tokens

_BACK = "_flip"


class RouteProjections(nn.Module):
    """Step sizes, B and C of all routes. Has no weights: the authors keep them in the mixer."""

    def forward(
        self, u: Tensor, ways: Sequence[ScanPath], x_proj_weight: Tensor, dt_projs_weight: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """For each way raw steps (B, S, E) without bias, B and C (B, S, N), as its scan visits the tokens.

        u                (B, L, E), in the order of the sequence
        x_proj_weight    (4, R + 2N, E)
        dt_projs_weight  (4, E, R)
        """
        rank = dt_projs_weight.shape[2]
        state = (x_proj_weight.shape[1] - rank) // 2
        # A projection sees one token at a time, and of a padding token, which is zero, it leaves zero.
        projected = functional.linear(u, x_proj_weight.flatten(0, 1)).chunk(len(ways), dim=-1)  # (B, L, R + 2N) each
        steps = []
        for way, values, weight in zip(ways, projected, dt_projs_weight, strict=True):
            rank_values, b, c = way.along(values).split([rank, state, state], dim=-1)
            steps.append((functional.linear(rank_values, weight), b, c))
        return steps


class LocalVMambaMixer(VMambaMixer):
    """The mixer of a block; `routes` are its four directions. The rest is as in VMambaMixer."""

    per_direction = ("projections", "multi_scan.attn")

    def __init__(self, dim: int, *, routes: Sequence[str], **sizes: Any) -> None:
        super().__init__(dim, **sizes)
        self.routes = tuple(routes)
        self.projections = RouteProjections()
        self.multi_scan = nn.ModuleDict({"attn": ChannelGate(self.d_inner)})

    def scan(self, u: Tensor, own: Tensor | None, flow: Inflow, columns: Visits, wanted: Wanted) -> ScanStatistics:
        """Outputs and, if wanted, step sizes of all directions, (B, L, E) each, at the tokens' own places.

        u, own  as `Inflow.pool` gives them
        """
        rates = decay_rates(self.A_logs).unflatten(0, (self.directions, -1))  # (4, E, N)
        skips = self.Ds.unflatten(0, (self.directions, -1))  # (4, E)
        ways = [scan_path(flow.scanned, route.removesuffix(_BACK)) for route in self.routes]
        projected = self.projections(u, ways, self.x_proj_weight, self.dt_projs_weight)
        outputs, deltas = [], []
        for direction, (route, way, (raw_delta, b, c)) in enumerate(zip(self.routes, ways, projected, strict=True)):
            reverse, bias, read = route.endswith(_BACK), self.dt_projs_bias[direction], flow.read
            y = flow.scan(
                direction,
                way.along(u),
                raw_delta,
                rates[direction],
                b,
                c,
                skips[direction],
                own=None if own is None else way.along(own),
                delta_bias=bias,
                gap=way.sequence.gaps(reverse=reverse),
                # Padding is zero there, and stands for one token.
                size=None if flow.size is None else way.along((flow.size - 1)[..., None])[..., 0] + 1,
                read=read if read is None or way.back is None else steps_of(way.back, read),
                reverse=reverse,
            )
            outputs.append(way.home(y) if read is None else y)
            if wanted == "delta":
                delta = way.home(functional.softplus(raw_delta + bias))
                deltas.append(delta if read is None else gather_tokens(delta, read))
        return ScanStatistics(tuple(outputs), tuple(deltas))

    def merge(self, ys: Sequence[Tensor], sequence: TokenSequence) -> Tensor:
        """The sum of what the gate leaves of each direction's output, (B, L, E)."""
        gate = self.multi_scan["attn"]
        total: Tensor = reduce(add, (gate(y, sequence) for y in ys))
        return total
