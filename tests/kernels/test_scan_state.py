"""States that go from scan to scan: values and gradients of every backend against float64, and states of every size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import CPU, PLAIN, available_backends, backends_for, selective_scan, use_backend
from ssmprune_cli.kernels.backend import CHUNKED
from ssmprune_cli.kernels.choice import pick

AVAILABLE = backends_for(torch.zeros(1))
STATES = (1, 16, 65, 128, 256)


def make(batch: int, length: int, channels: int, state: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    wide, narrow = (batch, length, channels), (batch, length, state)
    return {
        "u": normal(*wide),
        "delta": normal(*wide),
        "A": -normal(channels, state).exp(),
        "B": normal(*narrow),
        "C": normal(*narrow),
        "D": normal(channels),
        "z": normal(*wide),
        "delta_bias": normal(channels),
        "shift": normal(*wide).abs(),
        "initial_state": normal(batch, channels, state),
    }


def run(backend: str, inputs: dict[str, Tensor], dtype: torch.dtype, reverse: bool) -> dict[str, Tensor]:
    use_backend(backend)
    leaves: dict[str, Any] = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    y, state = selective_scan(**leaves, reverse=reverse, return_state=True)
    weights = [torch.linspace(-1, 1, each.numel(), dtype=dtype).view_as(each) for each in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), weights)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("state", STATES)
def test_values_and_gradients_with_states_of_every_size(state: int) -> None:
    """Every backend, and the C code at every level; channels that fill no vector, tokens that fill no chunk."""
    for reverse in (False, True):
        inputs = make(2, 19, 21, state)
        truth = run("reference", inputs, torch.float64, reverse)
        for backend in AVAILABLE:
            found = run(backend, inputs, torch.float32, reverse)
            for name, expected in truth.items():
                # Relative to the largest entry; sums over 256 states are the longest. Measured: 3e-6.
                error = (found[name].double() - expected).abs().max()
                assert error <= 1e-5 * expected.abs().max(), (backend, name, reverse, float(error))


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(backend: str, reverse: bool) -> None:
    use_backend(backend)
    inputs = make(2, 4, 2, 3)
    names = list(inputs)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        return selective_scan(**given, reverse=reverse, return_state=True)

    assert torch.autograd.gradcheck(scan, [value.requires_grad_() for value in inputs.values()])


@pytest.mark.parametrize("backend", AVAILABLE)
@settings(max_examples=15)
@given(data=st.data())
def test_two_scans_with_the_state_between_them_are_one(backend: str, data: st.DataObject) -> None:
    use_backend(backend)
    length = data.draw(st.integers(1, 40))
    cut, reverse = data.draw(st.integers(0, length)), data.draw(st.booleans())
    inputs: dict[str, Any] = {name: value.float() for name, value in make(2, length, 5, 17, seed=length).items()}
    whole, last = selective_scan(**inputs, reverse=reverse, return_state=True)
    parts = [
        {n: value[:, part] if n in ("u", "delta", "B", "C", "z", "shift") else value for n, value in inputs.items()}
        for part in (slice(0, cut), slice(cut, length))
    ]
    first, second = parts[::-1] if reverse else parts
    early, between = selective_scan(**first, reverse=reverse, return_state=True)
    second["initial_state"] = between
    late, state = selective_scan(**second, reverse=reverse, return_state=True)
    ys = (late, early) if reverse else (early, late)
    # Chunks of tokens begin elsewhere, and sums over states are of a few float32 roundings.
    torch.testing.assert_close(torch.cat(ys, dim=1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_the_state_alone_may_be_used(backend: str) -> None:
    """No gradient comes to y then; and the one of the initial state is that of a decay through every token."""
    use_backend(backend)
    inputs: dict[str, Any] = {name: value.float() for name, value in make(1, 18, 3, 2).items()}
    start = inputs.pop("initial_state").requires_grad_()
    _, state = selective_scan(**inputs, initial_state=start, return_state=True)
    (gradient,) = torch.autograd.grad(state.sum(), start)
    steps = torch.nn.functional.softplus(inputs["delta"] + inputs["delta_bias"]) + inputs["shift"]
    expected = torch.exp(steps.sum(dim=1)[..., None] * inputs["A"])
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("backend", AVAILABLE)
def test_half_precision_keeps_states_in_float32(backend: str) -> None:
    use_backend(backend)
    inputs: dict[str, Any] = {name: value.bfloat16() for name, value in make(2, 9, 5, 4).items()}
    inputs["initial_state"] = inputs["initial_state"].float()
    y, state = selective_scan(**inputs, return_state=True)
    wide: dict[str, Any] = {name: value.double() for name, value in inputs.items()}
    use_backend("reference")
    _, expected = selective_scan(**wide, return_state=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    # All arithmetic is in float32, on values that bfloat16 holds.
    assert (state - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("backend", AVAILABLE)
def test_a_sequence_without_tokens_passes_the_state_on(backend: str) -> None:
    use_backend(backend)
    inputs: dict[str, Any] = {name: value.float().requires_grad_() for name, value in make(2, 0, 5, 4).items()}
    y, state = selective_scan(**inputs, return_state=True)
    assert y.shape == (2, 0, 5) and torch.equal(state, inputs["initial_state"])
    (gradient,) = torch.autograd.grad(state.sum(), inputs["initial_state"])
    assert torch.equal(gradient, torch.ones_like(gradient))
    del inputs["initial_state"]
    assert torch.equal(selective_scan(**inputs, return_state=True)[1], torch.zeros(2, 5, 4))


def test_reading_some_tokens_leaves_the_state_as_it_is() -> None:
    for backend in AVAILABLE:
        use_backend(backend)
        inputs: dict[str, Any] = {name: value.float() for name, value in make(1, 20, 5, 4).items() if name != "z"}
        read = torch.tensor([[3, 1, 19]])
        y, state = selective_scan(**inputs, return_state=True)
        some, same = selective_scan(**inputs, read=read, return_state=True)
        assert torch.equal(some, y[:, read[0]]) and torch.equal(same, state)


def test_torch_compile_takes_states() -> None:
    """`aot_eager` compiles no code of its own, so that this stays quick."""
    leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in make(1, 5, 3, 2).items()}
    compiled: Any = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    pairs = [selective_scan(**leaves, return_state=True), compiled(**leaves, return_state=True)]
    gradients = [torch.autograd.grad((y * y).sum() + state.sin().sum(), list(leaves.values())) for y, state in pairs]
    torch.testing.assert_close(pairs[1], pairs[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of its own pytree
@pytest.mark.parametrize("reverse", [False, True])
def test_exported_programs_have_states_in_pytorch_operators(reverse: bool) -> None:
    inputs = {name: value.float() for name, value in make(1, 5, 3, 2).items()}
    names = list(inputs)

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
            given: dict[str, Any] = dict(zip(names, values, strict=True))
            return selective_scan(**given, reverse=reverse, return_state=True)

    program = torch.export.export(Module(), tuple(inputs.values())).run_decompositions(PLAIN)
    assert not any("ssmprune" in str(node.target) for node in program.graph.nodes)
    found = program.module()(*inputs.values())
    torch.testing.assert_close(found, Module()(*inputs.values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(2, 3, 4), "initial_state has shape"),
        (torch.zeros(2, 5, 4, dtype=torch.bfloat16), "states are torch.float32"),
        (torch.zeros(2, 5, 4, device="meta"), "initial_state is on meta"),
    ],
)
def test_a_state_that_does_not_fit_is_named(state: Tensor, message: str) -> None:
    inputs: dict[str, Any] = {name: value.float() for name, value in make(2, 3, 5, 4).items()}
    with pytest.raises(KernelError, match=message):
        selective_scan(**{**inputs, "initial_state": state})


def test_a_backend_that_takes_no_states_is_passed_over_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """As mamba-ssm's kernel: it gives a last state, but takes no initial one and no gradient of the last."""
    monkeypatch.setattr(CHUNKED, "carries_states", False)
    example = torch.zeros(1, dtype=torch.float64)
    assert (pick(example, 4).name, pick(example, 4, carried=True).name) == ("chunked", "reference")
    inputs: dict[str, Any] = make(1, 3, 2, 2)
    assert selective_scan(**inputs).isfinite().all()
    use_backend("chunked")
    with pytest.raises(KernelError, match="'chunked' does not take initial states"):
        selective_scan(**inputs)
    start = inputs.pop("initial_state")
    assert selective_scan(**inputs, return_state=True)[1].shape == start.shape
    inputs["u"].requires_grad_()
    with pytest.raises(KernelError, match="nor gradients of last ones"):
        selective_scan(**inputs, return_state=True)


@pytest.mark.skipif(available_backends()["cpu"] != "available", reason="needs the C kernels")
def test_threads_change_no_bit_of_the_state() -> None:
    inputs: dict[str, Any] = {name: value.float().requires_grad_() for name, value in make(3, 33, 70, 65).items()}
    assert CPU.accepts(inputs["u"], 65)
    use_backend("cpu")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        y, state = selective_scan(**inputs, return_state=True)
        results.append((y, state, *torch.autograd.grad(y.sum() + state.sin().sum(), list(inputs.values()))))
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
