"""The stock kernel's emulation of alignment, with a stand-in of the same signature and layout, in plain PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import selective_scan, use_backend
from ssmprune_cli.kernels.inputs import GRADIENTS, ScanInputs
from ssmprune_cli.kernels.mamba_cuda import MAMBA_CUDA, gradients_with, scan_and_state_with, scan_with

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "shift", "gap_delta")


class Stock:
    """mamba_ssm's SelectiveScanFn: (B, E, L) channels-first, one step size, forward only; checks what CUDA checks."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        assert u.dtype == delta.dtype == B.dtype == C.dtype and u.stride(-1) == delta.stride(-1) == 1
        assert all(value is None or value.dtype == torch.float32 for value in (A, D, delta_bias))
        assert B.shape == C.shape == (u.shape[0], A.shape[1], u.shape[2])
        given = (u, delta, A, B, C, D, z, delta_bias)
        ctx.leaves = [None if value is None else value.detach().requires_grad_() for value in given]
        with torch.enable_grad():
            ctx.out, state = Stock.scan(*ctx.leaves, softplus=delta_softplus)
        return (ctx.out.detach(), state.detach()) if return_last_state else ctx.out.detach()

    @staticmethod
    def scan(u: Any, delta: Any, A: Any, B: Any, C: Any, D: Any, z: Any, bias: Any, *, softplus: bool) -> Any:
        dtype = u.dtype
        u, delta, B, C = (value.double() for value in (u, delta, B, C))
        delta = delta if bias is None else delta + bias[:, None]
        delta = torch.nn.functional.softplus(delta) if softplus else delta
        state, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
        for t in range(u.shape[2]):
            drive = (delta * u)[:, :, t, None] * B[:, None, :, t]
            state = torch.exp(delta[:, :, t, None] * A) * state + drive
            outputs.append((state * C[:, None, :, t]).sum(-1))
        y = torch.stack(outputs, dim=2)
        y = y if D is None else y + D[:, None] * u
        return (y if z is None else y * torch.nn.functional.silu(z.double())).to(dtype), state.float()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        assert dout.stride(-1) == 1
        used = [leaf for leaf in ctx.leaves if leaf is not None]
        found = iter(torch.autograd.grad(ctx.out, used, dout))
        # As upstream: one for every argument of `forward`, None for the flags.
        return (*(None if leaf is None else next(found) for leaf in ctx.leaves), None, None)


def make(mode: str, extras: bool, dtype: torch.dtype, *, softplus: bool = True, reverse: bool = False) -> ScanInputs:
    """Values that `dtype` holds exactly, so that the reference sees the same ones; parameters in float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    batch, length, channels, state = 2, 11, 6, 5
    wide, narrow = (batch, length, channels), (batch, length, state)
    gap = torch.randint(0, 4, (batch, length), generator=generator).to(dtype)
    return ScanInputs(
        u=normal(*wide),
        delta=normal(*wide) if softplus else normal(*wide).abs(),
        A=-normal(channels, state).float().exp(),
        B=normal(*narrow),
        C=normal(*narrow),
        D=normal(channels).float() if extras else None,
        z=normal(*wide) if extras else None,
        delta_bias=normal(channels).float() if extras else None,
        delta_softplus=softplus,
        shift=normal(*wide).abs() if mode == "shift" else None,
        gap=gap if mode.startswith("gap") else None,
        gap_delta=normal(channels).float().abs() if mode == "gap+delta" else None,
        reverse=reverse,
    )


def truth(inputs: ScanInputs, grad: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The float64 reference."""
    use_backend("reference")
    try:
        leaves: Any = {
            name: value.double().requires_grad_() for name in NAMES if (value := getattr(inputs, name)) is not None
        }
        gap = None if inputs.gap is None else inputs.gap.double()
        y = selective_scan(**leaves, gap=gap, delta_softplus=inputs.delta_softplus, reverse=inputs.reverse)
        found = torch.autograd.grad(y, list(leaves.values()), grad.double())
    finally:
        use_backend("auto")
    return y.detach(), dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("mode", ["plain", "shift", "gap", "gap+delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(mode: str, dtype: torch.dtype) -> None:
    # Of the largest entry. float32: the stand-in is exact, what is left is the rounding of delta' and u'. bfloat16:
    # results are rounded to 2^-9 once; without alignment the sums over tokens also run over rounded values.
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    for extras, softplus, reverse in itertools.product((False, True), repeat=3):
        inputs = make(mode, extras, dtype, softplus=softplus, reverse=reverse)
        grad = torch.linspace(-1, 1, inputs.u.numel()).view_as(inputs.u).to(dtype)
        expected, gradients = truth(inputs, grad)
        y = scan_with(Stock, inputs)
        assert y.dtype == dtype and y.is_contiguous()
        assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()
        for name, found in zip(NAMES, gradients_with(Stock, grad, inputs), strict=True):
            given = getattr(inputs, name)
            assert (found is None) == (given is None), name
            if found is not None:
                assert found.dtype == given.dtype and found.shape == given.shape
                error = (found.double() - gradients[name]).abs().max() / gradients[name].abs().max()
                assert error <= tolerance, (name, extras, softplus, reverse, float(error))


@pytest.mark.parametrize("mode", ["plain", "gap+delta"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_last_state(mode: str, reverse: bool) -> None:
    inputs = make(mode, True, torch.float32, reverse=reverse)
    y, state = scan_and_state_with(Stock, inputs)
    assert torch.equal(y, scan_with(Stock, inputs))
    values: Any = inputs._asdict()
    wide: Any = {name: value.double() if isinstance(value, Tensor) else value for name, value in values.items()}
    use_backend("reference")
    _, expected = selective_scan(**wide, return_state=True)
    # As above: what is left is the rounding of delta' and u'.
    assert (state - expected).abs().max() <= 2e-6 * expected.abs().max()
    assert state.is_contiguous() and state.dtype == torch.float32


def test_it_takes_no_states() -> None:
    """Its backward pass would ignore the gradient of the last one."""
    assert not MAMBA_CUDA.carries_states


def test_tokens_without_a_step_stay_finite() -> None:
    """delta' = 0 has no inverse: such a token neither decays nor drives."""
    inputs = make("gap", False, torch.float32, softplus=False)
    inputs.delta[:, 3:5] = 0
    expected, gradients = truth(inputs, torch.ones_like(inputs.u))
    torch.testing.assert_close(scan_with(Stock, inputs).double(), expected, rtol=0, atol=1e-5)
    found = dict(zip(NAMES, gradients_with(Stock, torch.ones_like(inputs.u), inputs), strict=True))
    for name in ("u", "A", "B", "C"):  # delta's gradient is the documented exception
        value = found[name]
        assert value is not None
        torch.testing.assert_close(value.double(), gradients[name], rtol=1e-5, atol=1e-5)
    assert found["delta"] is not None and found["delta"].isfinite().all()


def test_the_convolution_goes_through_the_package_for_its_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        assert activation == "silu"
        calls.append(weight.shape[1])
        padded = torch.nn.functional.pad(x, (weight.shape[1] - 1, 0))
        return torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))

    monkeypatch.setattr(MAMBA_CUDA, "_conv", causal_conv1d_fn)
    x, bias = torch.randn(2, 7, 3), torch.randn(3)
    from ssmprune_cli.kernels.pytorch.eager import conv_silu

    for width, reverse in itertools.product((1, 2, 4, 5), (False, True)):
        weight = torch.randn(3, width)
        expected = conv_silu(x, weight, bias, reverse)
        torch.testing.assert_close(MAMBA_CUDA.conv(x, weight, bias, reverse), expected, rtol=1e-5, atol=1e-6)
    assert calls == [2, 2, 4, 4]


@pytest.mark.skipif(MAMBA_CUDA.missing() is None, reason="mamba-ssm runs here")
def test_it_says_what_is_missing() -> None:
    reason = MAMBA_CUDA.missing()
    with pytest.raises(KernelError, match="'mamba_cuda' cannot be used") as caught:
        use_backend("mamba_cuda")
    assert reason and reason in str(caught.value)
    assert not MAMBA_CUDA.accepts(torch.zeros(1), 16)


@pytest.mark.skipif(MAMBA_CUDA.missing() is not None, reason="needs mamba-ssm and a CUDA device")
@pytest.mark.parametrize("mode", ["plain", "shift", "gap", "gap+delta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_kernel(mode: str, dtype: torch.dtype) -> None:
    inputs = make(mode, True, dtype, reverse=True)
    grad = torch.linspace(-1, 1, inputs.u.numel()).view_as(inputs.u).to(dtype)
    expected, gradients = truth(inputs, grad)
    values: dict[str, Any] = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs._asdict().items()}
    moved = ScanInputs(**values)
    # float32: exp and the sums are the kernel's own.
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    assert (MAMBA_CUDA.scan(moved).double().cpu() - expected).abs().max() <= tolerance * expected.abs().max()
    for name, found in zip(GRADIENTS, MAMBA_CUDA.scan_backward(grad.cuda(), moved), strict=True):
        if found is not None:
            error = (found.double().cpu() - gradients[name]).abs().max()
            assert error <= tolerance * gradients[name].abs().max(), name
