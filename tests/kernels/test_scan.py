"""Every backend against the sequential float64 scan: values, every gradient, alignment, strides."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import KernelError, UsageError
from ssmprune_cli.kernels import (
    backends_for,
    causal_conv1d,
    scan_flops,
    selective_scan,
    use_backend,
)

AVAILABLE = backends_for(torch.zeros(1))
SHAPES = [(2, 37, 48, 16), (1, 1, 5, 4), (3, 16, 96, 1), (1, 33, 13, 16), (2, 18, 8, 5)]  # B, L, E, N


def make(
    shape: tuple[int, int, int, int], mode: str, extras: bool, seed: int = 0
) -> tuple[dict[str, Tensor], Tensor | None]:
    """float64 inputs that take gradients, and the gap, which does not."""
    batch, length, channels, state = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    inputs = {
        "u": normal(batch, length, channels),
        "delta": normal(batch, length, channels),
        "A": -normal(channels, state).exp(),
        "B": normal(batch, length, state),
        "C": normal(batch, length, state),
    }
    if extras:
        inputs |= {"D": normal(channels), "z": normal(batch, length, channels), "delta_bias": normal(channels)}
    gap = torch.randint(0, 4, (batch, length), generator=generator).double() if mode.startswith("gap") else None
    if mode == "shift":
        inputs["shift"] = normal(batch, length, channels).abs()
    if mode == "gap+delta":
        inputs["gap_delta"] = normal(channels).abs()
    return inputs, gap


def run(
    backend: str, inputs: dict[str, Tensor], gap: Tensor | None, reverse: bool, dtype: torch.dtype
) -> dict[str, Tensor]:
    use_backend(backend)
    leaves: dict[str, Any] = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    y = selective_scan(**leaves, gap=None if gap is None else gap.to(dtype), reverse=reverse)
    weight = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
    gradients = torch.autograd.grad(y, list(leaves.values()), weight)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", ["plain", "shift", "gap", "gap+delta"])
def test_values_and_gradients_in_float32(backend: str, shape: tuple[int, int, int, int], mode: str) -> None:
    for reverse, extras in itertools.product((False, True), repeat=2):
        inputs, gap = make(shape, mode, extras)
        truth = run("reference", inputs, gap, reverse, torch.float64)
        found = run(backend, inputs, gap, reverse, torch.float32)
        for name, expected in truth.items():
            # Relative to the largest entry. Measured: 5e-6 for the sums over channels (B, C), 1e-6 for the others.
            error = (found[name].double() - expected).abs().max()
            assert error <= 1e-5 * expected.abs().max(), (name, reverse, extras, float(error))


@pytest.mark.parametrize("forward", AVAILABLE)
@pytest.mark.parametrize("backward", AVAILABLE)
def test_another_backend_may_go_back(forward: str, backward: str) -> None:
    """What one kept of the states is no use to the other, which then does without or computes its own."""
    inputs, gap = make((2, 37, 9, 4), "gap", extras=True)
    truth = run("reference", inputs, gap, True, torch.float64)
    use_backend(forward)
    leaves: dict[str, Any] = {name: value.float().requires_grad_() for name, value in inputs.items()}
    y = selective_scan(**leaves, gap=gap, reverse=True)
    use_backend(backward)
    gradients = torch.autograd.grad(y, list(leaves.values()), torch.linspace(-1, 1, y.numel()).view_as(y))
    for name, found in zip(leaves, gradients, strict=True):
        # As in the test above.
        assert (found.double() - truth[name]).abs().max() <= 1e-5 * truth[name].abs().max(), name


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_nobody_reads_still_feed_the_state(backend: str, reverse: bool, dtype: torch.dtype) -> None:
    """Only the tokens asked for come out, with the bits of the whole scan; gradients are those of a scan whose other
    outputs are not used."""
    use_backend(backend)
    inputs, gap = make((2, 37, 9, 16), "gap+delta", extras=True)
    del inputs["z"]
    leaves: dict[str, Any] = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    read = torch.stack([torch.randperm(37)[:20], torch.arange(17, 37)])
    given: dict[str, Any] = {**leaves, "gap": gap, "reverse": reverse}
    whole = selective_scan(**given)
    found = selective_scan(**given, read=read)
    index = read[..., None].expand(-1, -1, 9)
    assert torch.equal(found, whole.gather(1, index))
    weight = torch.linspace(-1, 1, found.numel()).to(dtype).view_as(found)
    wanted = torch.autograd.grad(whole, list(leaves.values()), torch.zeros_like(whole).scatter(1, index, weight))
    gradients = torch.autograd.grad(found, list(leaves.values()), weight)
    for one, other in zip(gradients, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("mode", ["plain", "shift", "gap", "gap+delta"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend: str, mode: str, reverse: bool) -> None:
    use_backend(backend)
    inputs, gap = make((2, 5, 3, 2), mode, extras=True)
    names = list(inputs)

    def scan(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        y: Tensor = selective_scan(**given, gap=gap, reverse=reverse)
        return y

    assert torch.autograd.gradcheck(scan, [value.requires_grad_() for value in inputs.values()])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reverse", [False, True])
@given(data=st.data())
def test_the_short_aligned_scan_is_the_full_scan_without_the_pruned_inputs(
    backend: str, reverse: bool, data: st.DataObject
) -> None:
    """The definition of alignment: with the pruned tokens' true steps in `shift`, nothing else is lost."""
    use_backend(backend)
    length = data.draw(st.integers(2, 40))
    kept = sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1)))
    inputs, _ = make((2, length, 3, 4), "plain", extras=True, seed=length)
    softplus = torch.nn.functional.softplus(inputs["delta"] + inputs["delta_bias"])
    index = torch.tensor(kept)
    pruned = torch.ones(length, dtype=torch.bool).index_fill(0, index, False)
    full_inputs: dict[str, Any] = {**inputs, "u": inputs["u"].masked_fill(pruned[None, :, None], 0)}
    full = selective_scan(**full_inputs, reverse=reverse)[:, index]
    lost = softplus * pruned[None, :, None]
    shift = torch.zeros(2, len(kept), 3, dtype=torch.float64)
    for i, position in enumerate(kept):
        before = kept[i + 1 :][:1] if reverse else kept[:i][-1:]
        if before:  # the first token of a scan has no state to decay
            low, high = sorted((position, before[0]))
            shift[:, i] = lost[:, low + 1 : high].sum(dim=1)
    per_token = ("u", "delta", "B", "C", "z")
    short_inputs: dict[str, Any] = {n: v[:, index] if n in per_token else v for n, v in inputs.items()}
    short = selective_scan(**short_inputs, shift=shift, reverse=reverse)
    torch.testing.assert_close(short, full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_long_and_extreme_scans_stay_accurate(backend: str) -> None:
    """Slow decays over 4,096 tokens compound every error of exp; huge shifts must clear the state, not overflow it."""
    inputs, _ = make((1, 4096, 8, 4), "plain", extras=False)
    inputs["A"] = -0.01 * torch.linspace(0, 1, 32, dtype=torch.float64).view(8, 4)
    truth = run("reference", inputs, None, False, torch.float64)["y"]
    found = run(backend, inputs, None, False, torch.float32)["y"].double()
    own = run("reference", inputs, None, False, torch.float32)["y"].double()
    # Root mean squares: the largest error alone is a matter of luck. Over seeds and processors: 0.3 to 1.6 times.
    assert (found - truth).square().mean().sqrt() <= 2 * (own - truth).square().mean().sqrt()
    use_backend(backend)
    values: dict[str, Any] = {name: value.float() for name, value in inputs.items()}
    for shift in (1e4, 1e20):
        y = selective_scan(**values, shift=torch.full((1, 4096, 8), shift))
        assert torch.isfinite(y).all()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_slices_of_a_projection_are_read_in_place(backend: str) -> None:
    use_backend(backend)
    wide = torch.randn(2, 9, 40)
    u, delta, b, c = wide[..., :12], wide[..., 12:24], wide[..., 24:28], wide[..., 28:32]
    A = -torch.rand(12, 4)
    expected = selective_scan(u.contiguous(), delta.contiguous(), A, b.contiguous(), c.contiguous())
    # PyTorch may take another loop for another layout: a few float32 roundings.
    torch.testing.assert_close(selective_scan(u, delta, A, b, c), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("shape", [(2, 9, 16), (1, 1, 5), (3, 2, 13)], ids=str)
@pytest.mark.parametrize("width", [1, 4])
def test_convolution(backend: str, shape: tuple[int, int, int], width: int) -> None:
    channels = shape[-1]
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64)
    weight, bias = torch.randn(channels, width, dtype=torch.float64), torch.randn(channels, dtype=torch.float64)
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
    padded = torch.nn.functional.pad(leaves[0].transpose(1, 2), (width - 1, 0))
    y = torch.nn.functional.conv1d(padded, leaves[1][:, None], leaves[2], groups=channels).transpose(1, 2)
    expected = torch.nn.functional.silu(y)
    gradients = torch.autograd.grad(expected.sin().sum(), leaves)
    for reverse in (False, True):
        use_backend(backend)
        single = [value.float().requires_grad_() for value in (x.flip(1) if reverse else x, weight, bias)]
        found = causal_conv1d(single[0], single[1], single[2], reverse=reverse)
        own = torch.autograd.grad(found.sin().sum(), single)
        both = [(found, expected), *zip(own, gradients, strict=True)]
        for place, (a, b) in enumerate(both):
            mirrored = a.flip(1) if reverse and place < 2 else a
            # Relative to the largest entry: sums over tokens cancel in part.
            assert (mirrored.double() - b).abs().max() <= 5e-6 * b.abs().max()


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("mode", ["plain", "shift", "gap+delta"])
def test_half_precision_activations_with_a_float32_state(backend: str, mode: str) -> None:
    """bfloat16 in and out, parameters in float32 or bfloat16: as exact as rounding what goes in and out allows."""
    for shape, parameters in (((2, 21, 16, 16), torch.float32), ((1, 18, 13, 5), torch.bfloat16)):
        inputs, gap = make(shape, mode, extras=True)
        plain = ("A", "D", "delta_bias", "gap_delta")
        given = {n: v.to(parameters if n in plain else torch.bfloat16) for n, v in inputs.items()}
        truth = run("reference", {n: v.double() for n, v in given.items()}, gap, True, torch.float64)
        use_backend(backend)
        leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in given.items()}
        y = selective_scan(**leaves, gap=gap, reverse=True)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        found = {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), weight.to(y)), strict=True))}
        assert y.dtype == torch.bfloat16
        for name, value in found.items():
            assert value.dtype == (y.dtype if name == "y" else given[name].dtype)
            # bfloat16 keeps 8 bits: 0.4 % of an entry, and of the gradient that comes in.
            assert (value.double() - truth[name]).abs().max() <= 0.008 * truth[name].abs().max(), name


def test_torch_compile_takes_the_ops_as_they_are() -> None:
    """One graph, forward and backward; `aot_eager` compiles no code of its own, so that this stays quick."""
    inputs, gap = make((2, 5, 4, 3), "gap+delta", extras=True)
    leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in inputs.items()}
    expected = selective_scan(**leaves, gap=gap)
    wanted = torch.autograd.grad(expected.sin().sum(), list(leaves.values()))
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    found = compiled(**leaves, gap=gap)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    gradients = torch.autograd.grad(found.sin().sum(), list(leaves.values()))
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)


def test_ops_pass_opcheck_and_export() -> None:
    inputs, gap = make((2, 5, 4, 3), "gap+delta", extras=True)
    given = [inputs[name].requires_grad_() for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    gap_delta = inputs["gap_delta"].requires_grad_()
    op, state = torch.ops.ssmprune.selective_scan, torch.ones(2, 4, 3, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(op, (*given, True, None, gap, gap_delta, True, None, None, False, True))
    torch.library.opcheck(op, (*given, True, None, gap, None, True, None, state, True, True))
    ungated, read = [*given[:6], None, given[7]], torch.tensor([[4, 1], [0, 2]])
    torch.library.opcheck(op, (*ungated, True, None, None, None, False, read, None, False, False))
    weight = torch.randn(4, 3, dtype=torch.float64)
    torch.library.opcheck(torch.ops.ssmprune.causal_conv1d, (given[0], weight, given[5], False))

    class Module(torch.nn.Module):
        def forward(self, u: Tensor, delta: Tensor, A: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return selective_scan(u, delta, A, b, c)

    plain = tuple(value.detach() for value in given[:5])
    program = torch.export.export(Module(), plain)
    assert any("selective_scan" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*plain), Module()(*plain), rtol=0, atol=0)


def test_torch_counts_twice_the_multiply_adds() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    inputs, _ = make((2, 5, 4, 3), "plain", extras=True)
    given: dict[str, Any] = inputs
    with FlopCounterMode(display=False) as counter:
        selective_scan(**given)
    assert counter.get_total_flops() == 2 * scan_flops(2, 5, 4, 3, has_D=True, has_z=True) == 2 * 40 * (27 + 2)
    del given["z"]
    with FlopCounterMode(display=False) as counter:
        selective_scan(**given, read=torch.tensor([[0, 2, 3], [1, 3, 4]]))
    # Two of five tokens are not read out: 7 N instead of 9 N, and no D.
    assert counter.get_total_flops() == 2 * 2 * 4 * (3 * (27 + 1) + 2 * 21)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_inference_mode_and_tracing_give_the_same(backend: str) -> None:
    use_backend(backend)
    inputs: dict[str, Any] = {name: value.float() for name, value in make((2, 5, 3, 2), "plain", True)[0].items()}
    expected = selective_scan(**inputs)
    with torch.inference_mode():
        assert torch.equal(selective_scan(**inputs), expected)
    traced = torch.jit.trace(lambda u: selective_scan(**{**inputs, "u": u}), inputs["u"])
    assert "ssmprune::selective_scan" in str(traced.graph)
    assert torch.equal(traced(inputs["u"]), expected)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_broken_token_is_not_hidden(backend: str) -> None:
    """NaN must come out as NaN, from the token on and in its channel only."""
    use_backend(backend)
    inputs: dict[str, Any] = {name: value.float() for name, value in make((1, 6, 5, 4), "plain", True)[0].items()}
    for name in ("u", "delta"):
        broken = inputs[name].clone()
        broken[0, 2, 3] = torch.nan
        lost = selective_scan(**{**inputs, name: broken}).isnan()
        assert lost[0, 2:, 3].all() and lost.sum() == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(4, 3)}, "A has shape"),
        ({"B": torch.zeros(2, 5, 9)}, "B has shape"),
        ({"delta": torch.zeros(2, 5, 3, dtype=torch.float64)}, "delta is torch.float64"),
        ({"shift": torch.zeros(2, 5, 3), "gap": torch.zeros(2, 5)}, "exclude"),
        ({"gap": torch.zeros(2, 4)}, "gap has shape"),
        ({"C": torch.zeros(2, 5, 2, device="meta")}, "C is on meta"),
        ({"gap_delta": torch.zeros(3)}, "needs gap"),
        ({"read": torch.zeros(2, 1)}, "read must be int64"),
        ({"read": torch.zeros(2, 1, dtype=torch.int64), "z": torch.zeros(2, 5, 3)}, "exclude"),
        ({"u": torch.zeros(5, 3)}, "batch, tokens, channels"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    inputs: dict[str, Any] = {name: value.float() for name, value in make((2, 5, 3, 2), "plain", False)[0].items()}
    with pytest.raises(KernelError, match=message):
        selective_scan(**{**inputs, **change})


def test_unknown_backend_and_wrong_dtype() -> None:
    with pytest.raises(UsageError, match="unknown kernel backend"):
        use_backend("cuda-magic")
    if "cpu" in AVAILABLE:
        use_backend("cpu")
        with pytest.raises(KernelError, match="float64"):
            selective_scan(**make((1, 2, 3, 2), "plain", False)[0])  # type: ignore[call-overload]


def test_auto_leaves_what_the_c_kernel_cannot_hold_to_pytorch() -> None:
    """More states or taps than fit its arrays."""
    inputs, _ = make((1, 3, 2, 257), "plain", False)
    values: dict[str, Any] = {name: value.float() for name, value in inputs.items()}
    x, weight, bias = torch.randn(1, 70, 2), torch.randn(2, 257), torch.randn(2)
    found = selective_scan(**values), causal_conv1d(x, weight, bias)
    use_backend("chunked")
    assert torch.equal(found[0], selective_scan(**values)) and torch.equal(found[1], causal_conv1d(x, weight, bias))
    if "cpu" in AVAILABLE:
        use_backend("cpu")
        with pytest.raises(KernelError, match="257 states"):
            selective_scan(**values)
        with pytest.raises(KernelError, match="257 states or taps"):
            causal_conv1d(x, weight, bias)


def test_without_a_compiler_the_scan_still_runs(tmp_path: Path) -> None:
    code = (
        "import torch; from ssmprune_cli import kernels as k\n"
        "u, b = torch.ones(1, 2, 3), torch.ones(1, 2, 1)\n"
        "y = k.selective_scan(u, u, -torch.ones(3, 1), b, b)\n"
        "assert torch.isfinite(y).all()\n"
        "import sys; sys.stdout.write(k.active_backend() + '|' + k.available_backends()['cpu'])"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache"), "CC": "nothing"}
    environment.pop("SSMPRUNE_BACKEND", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "chunked|no C compiler was found (cc, gcc, clang or $CC)"
    forced = {**environment, "SSMPRUNE_BACKEND": "cpu"}
    failed = subprocess.run([sys.executable, "-c", code], env=forced, capture_output=True, text=True, check=False)
    assert failed.returncode != 0 and "'cpu' cannot be used: no C compiler" in failed.stderr
