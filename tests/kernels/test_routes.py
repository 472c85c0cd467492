"""Scans along several routes in one op, against scans one by one in float64 by the reference backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import backends_for, pack_routes, routed_scans, selective_scan, use_backend

AVAILABLE = [name for name in backends_for(torch.zeros(1)) if name != "reference"]
G, B, N = 4, 3, 5


class Case:
    """Random inputs of all routes. `mode` says what samples and routes share, as the families do."""

    def __init__(self, length: int, channels: int, rank: int, mode: str, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(length + channels)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, dtype=torch.float64, generator=generator).to(dtype)

        def permutations(count: int) -> Tensor:
            return torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])

        self.u = normal(B, length, 2 * channels)[..., channels:]  # rows are apart in memory
        self.rank = rank
        slices = 1 if mode.startswith("plainmamba") else G
        self.projected = normal(B, length, slices, rank + 2 * N)
        self.dt_weight, self.A = normal(G, channels, rank) / max(rank, 1) ** 0.5, -normal(G, channels, N).exp()
        self.bias, self.D = normal(G, channels), normal(G, channels)
        dense = mode.endswith("dense")
        self.order = permutations(G)[:, None] if dense else permutations(G * B).unflatten(0, (G, B))
        self.given: dict[str, Any] = {}
        if mode == "plainmamba dense":
            self.given["extra_B"] = normal(G, 1, length, N)
        elif mode == "plainmamba pruned":
            self.given["extra_B"] = normal(G, B, length, N)
            self.given["rows"] = torch.randint(0, length, (G, B, length), generator=generator)
        else:
            self.given["rows"] = self.order
        if not dense:
            self.given["gap"] = torch.randint(0, 4, (G, B, length), generator=generator).to(dtype)
            self.given["gap_delta"] = normal(G, channels).abs()

    def run(self) -> Tensor:
        parameters = pack_routes(self.dt_weight, self.A, self.bias, self.D)
        return routed_scans(self.u, self.projected, parameters, N, self.order, **self.given)

    def one_by_one(self) -> Tensor:
        total = torch.zeros_like(self.u)
        for g in range(G):
            order = self.order[g].expand(B, -1)
            steps = self.projected[:, :, g % self.projected.shape[2]]
            for sample in range(B):
                rows = self.given["rows"][g].expand(B, -1)[sample] if "rows" in self.given else slice(None)
                rank_values, b, c = steps[sample, rows].split([self.rank, N, N], dim=-1)
                if "extra_B" in self.given:
                    extra = self.given["extra_B"][g]
                    b = b + extra[sample if len(extra) > 1 else 0]
                gap = self.given["gap"][g, sample][None] if "gap" in self.given else None
                y = selective_scan(
                    self.u[sample, order[sample]][None],
                    (rank_values @ self.dt_weight[g].t())[None],
                    self.A[g],
                    b[None],
                    c[None],
                    self.D[g],
                    delta_bias=self.bias[g],
                    gap=gap,
                    gap_delta=None if gap is None else self.given["gap_delta"][g],
                )
                total[sample, order[sample]] += y[0]
        return total


MODES = ["plainmamba dense", "plainmamba pruned", "vmamba dense", "vmamba pruned"]


def error(found: Tensor, truth: Tensor) -> float:
    """The largest error in units of the largest value."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), channels=st.integers(1, 70), rank=st.integers(0, 7))
def test_values(mode: str, length: int, channels: int, rank: int) -> None:
    use_backend("reference")
    truth = Case(length, channels, rank, mode, torch.float64).one_by_one()
    for backend in ("reference", *AVAILABLE):
        use_backend(backend)
        # Measured: 4e-7 in float32.
        assert error(Case(length, channels, rank, mode, torch.float32).run(), truth) <= 3e-6
        use_backend("reference")
    assert error(Case(length, channels, rank, mode, torch.float64).run(), truth) <= 1e-13


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(backend: str, mode: str) -> None:
    use_backend("reference")
    truth = Case(33, 40, 3, mode, torch.float64).one_by_one()
    use_backend(backend)
    found = Case(33, 40, 3, mode, torch.bfloat16).run()
    assert found.dtype == torch.bfloat16
    assert error(found, truth) <= 1.5e-2  # inputs have 8 bits; measured: 7e-3


@pytest.mark.parametrize("mode", MODES)
def test_threads_do_not_change_a_bit(mode: str) -> None:
    torch.set_num_threads(1)
    expected = Case(21, 100, 3, mode, torch.float32).run()
    for threads in (2, 5):
        torch.set_num_threads(threads)
        assert torch.equal(Case(21, 100, 3, mode, torch.float32).run(), expected)


@pytest.mark.parametrize("mode", MODES)
def test_pass_opcheck(mode: str) -> None:
    case = Case(6, 4, 2, mode, torch.float32)
    parameters = pack_routes(case.dt_weight, case.A, case.bias, case.D)
    given_values = [case.given.get(name) for name in ("rows", "extra_B", "gap", "gap_delta")]
    torch.library.opcheck(
        torch.ops.ssmprune.routed_scans.default,
        (case.u, case.projected, parameters, N, case.order, *given_values),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_what_does_not_fit_is_named() -> None:
    case = Case(6, 4, 2, "plainmamba pruned", torch.float32)
    parameters = pack_routes(case.dt_weight, case.A, case.bias, case.D)
    u, projected, order, lost = case.u, case.projected, case.order, case.given
    calls: dict[str, Callable[[], object]] = {
        "parameters has shape": lambda: routed_scans(u, projected, parameters[:, 1:], N, order),
        "projected has shape": lambda: routed_scans(u, projected.expand(-1, -1, 3, -1), parameters, N, order),
        r"projected has shape \(3, 6, 12\)": lambda: routed_scans(u, projected[:, :, 0], parameters, N, order),
        r"order must be int64 of shape \(4, 3, 6\) beside u, not torch.int64 \(4, 2, 6\)": lambda: routed_scans(
            u, projected, parameters, N, order[:, :2]
        ),
        "order must be int64": lambda: routed_scans(u, projected, parameters, N, order.int()),
        "rows must be int64": lambda: routed_scans(u, projected, parameters, N, order, rows=order[:3]),
        "extra_B has shape": lambda: routed_scans(u, projected, parameters, N, order, extra_B=lost["extra_B"][:, :2]),
        "gap_delta needs gap": lambda: routed_scans(u, projected, parameters, N, order, gap_delta=lost["gap_delta"]),
        "parameters must be torch.float32": lambda: routed_scans(
            u.bfloat16(), projected.bfloat16(), parameters.bfloat16(), N, order
        ),
        "a token that is not there": lambda: routed_scans(u, projected, parameters, N, order + 1),
        "token that is not there": lambda: routed_scans(u, projected, parameters, N, order, rows=order - 1),
        "no gradient": lambda: routed_scans(u.requires_grad_(), projected, parameters, N, order),
    }
    for message, call in calls.items():
        with pytest.raises(KernelError, match=message):
            call()
