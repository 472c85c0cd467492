"""The public op `routed_scans`: scans of the same tokens along several routes over a grid, summed; for inference.

Glossary: as in inputs.py; G routes. A *step* is one tick of a scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels.choice import pick
from ssmprune_cli.kernels.inputs import RoutedInputs
from ssmprune_cli.kernels.ops.library import Expected, check, counted, define, refuse_gradients, three
from ssmprune_cli.kernels.ops.scan import scan_flops


def routed_scans(
    u: Tensor,
    projected: Tensor,
    parameters: Tensor,
    d_state: int,
    order: Tensor,
    *,
    rows: Tensor | None = None,
    extra_B: Tensor | None = None,
    gap: Tensor | None = None,
    gap_delta: Tensor | None = None,
) -> Tensor:
    """Of each route y = scan(u, dt_weight rank, A, B + extra_B, C, D, bias) in the route's order; then their sum, every
    output at its own token (ChenhongyiYang/PlainMamba 0975a1d; MzeroMiko/VMamba 2ed52ea, cross_scan and cross_merge).

    u               (B, L, E)
    projected       (B, L, G, R + 2N): rank, B and C of each route, or (B, L, 1, R + 2N) of all alike
    parameters      (G, n), from `pack_routes`
    order           (G, B, L) int64: the token that each step visits, each one once
    rows            (G, B, L) int64: the token that lends each step its rank, B and C. Without, step t takes token t's
    extra_B         (G, B, L, N), of each step
    gap, gap_delta  (G, B, L) of each step, (G, E), as in `selective_scan`

    `order`, `rows` and `extra_B` may have (G, 1, L, ...), for all samples alike.

    Returns (B, L, E). Has no gradient. Raises KernelError for what does not fit.
    """
    batch, length, channels = three(u, "u")
    routes, slices = len(parameters), projected.shape[2] if projected.ndim == 4 else 0
    rank = projected.shape[-1] - 2 * d_state
    wide = torch.promote_types(u.dtype, torch.float32)
    gap = None if gap is None else gap.to(wide)
    by_step = {"order": order, "rows": rows, "extra_B": extra_B}
    expected: Expected = {"parameters": (parameters, (routes, channels * (rank + d_state + 2)))}
    if gap is not None:
        expected["gap"] = (gap, (routes, batch, length))
    if gap_delta is not None:
        expected["gap_delta"] = (gap_delta, (routes, channels))
    samples = {name: 1 if each is not None and each.shape[1:2] == (1,) else batch for name, each in by_step.items()}
    if extra_B is not None:
        expected["extra_B"] = (extra_B, (routes, samples["extra_B"], length, d_state))
    check(u, {"projected": (projected, (batch, length, slices, rank + 2 * d_state))}, expected)
    if parameters.dtype != wide:
        raise KernelError(f"parameters must be {wide}, not {parameters.dtype}")
    if rank < 0 or slices not in (1, routes):
        raise KernelError(f"projected has shape {tuple(projected.shape)}, for {routes} routes and {d_state} states")
    for name in ("order", "rows"):
        tokens, wanted = by_step[name], (routes, samples[name], length)
        if tokens is not None and (tokens.shape != wanted or tokens.dtype != torch.int64 or tokens.device != u.device):
            raise KernelError(
                f"{name} must be int64 of shape {wanted} beside u, not {tokens.dtype} {tuple(tokens.shape)}"
            )
    if gap_delta is not None and gap is None:
        raise KernelError("gap_delta needs gap")
    refuse_gradients(u, projected, parameters)
    given = (order, rows, extra_B, gap, gap_delta)
    result: Tensor = torch.ops.ssmprune.routed_scans(u, projected, parameters, d_state, *given)
    return result


def _routed(
    u: Tensor,
    projected: Tensor,
    parameters: Tensor,
    d_state: int,
    order: Tensor,
    rows: Tensor | None,
    extra_B: Tensor | None,
    gap: Tensor | None,
    gap_delta: Tensor | None,
) -> Tensor:
    inputs = RoutedInputs(u, projected, parameters, d_state, order, rows, extra_B, gap, gap_delta)
    return pick(u, d_state).routed_scans(inputs)


def _routed_fake(u: Tensor, *others: Any) -> Tensor:
    return u.new_empty(u.shape)


define("routed_scans", _routed, _routed_fake)


@counted("routed_scans")
def _(
    u: Any,
    projected: Any,
    parameters: Any,
    d_state: int,
    order: Any,
    rows: Any,
    extra_B: Any,
    gap: Any,
    *_: Any,
    **__: Any,
) -> int:
    batch, length, channels = u
    # Routes that are all given the same share their step sizes: a model projects them once.
    steps = batch * length * channels * projected[2] * (projected[3] - 2 * d_state)
    scan = scan_flops(batch, length, channels, d_state, has_D=True, aligned=gap is not None)
    return int(steps + parameters[0] * scan)
