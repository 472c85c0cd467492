"""Mamba-2's scan in chunks against the recurrence in float64, token by token, and its gradients against autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import PLAIN, backends_for, selective_scan, ssd_flops, ssd_scan, use_backend
from ssmprune_cli.kernels.inputs import SSD_GRADIENTS, SsdInputs
from ssmprune_cli.kernels.pytorch import reference_ssd, ssd

AVAILABLE = backends_for(torch.zeros(1))
MODES = ["plain", "shift", "gap", "gap+delta"]
# B, L, H, P, G, N: one token, chunks that are full, one token more and less, several segments, states of every size.
SHAPES = [
    (2, 1, 4, 3, 2, 1),
    (1, 64, 2, 4, 1, 16),
    (1, 65, 6, 3, 3, 65),
    (2, 63, 4, 5, 2, 128),
    (2, 150, 2, 7, 1, 256),
]
Shape = tuple[int, int, int, int, int, int]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens make several chunks of several segments."""
    monkeypatch.setattr(ssd, "SSD_CHUNK", 4)
    monkeypatch.setattr(ssd, "DECAYS", 2 * 4 * 4 * 4)


def make(shape: Shape, mode: str, seed: int = 0) -> tuple[dict[str, Tensor], Tensor | None]:
    """float64 inputs that take gradients, and the gap, which does not."""
    batch, length, heads, width, groups, state = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    inputs = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, state),
    }
    gap = torch.randint(0, 4, (batch, length), generator=generator).double() if mode.startswith("gap") else None
    if mode == "shift":
        inputs["shift"] = normal(batch, length, heads).abs()
    if mode == "gap+delta":
        inputs["gap_delta"] = normal(heads).abs()
    return inputs, gap


def with_gradients(y: Tensor, state: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = [torch.linspace(-1, 1, each.numel(), dtype=each.dtype).view_as(each) for each in (y, state)]
    gradients = torch.autograd.grad([y, state], list(leaves.values()), weights)
    return {"y": y.detach(), "state": state.detach(), **dict(zip(leaves, gradients, strict=True))}


def run(backend: str, inputs: dict[str, Tensor], gap: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    use_backend(backend)
    leaves: dict[str, Any] = {name: value.to(dtype).requires_grad_() for name, value in inputs.items()}
    y, state = ssd_scan(**leaves, gap=gap)
    return with_gradients(y, state, leaves)


def truth_of(inputs: dict[str, Tensor], gap: Tensor | None) -> dict[str, Tensor]:
    """By autograd, through every step of the recurrence."""
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    fields: dict[str, Any] = dict.fromkeys(SSD_GRADIENTS) | leaves | {"gap": gap, "dt_softplus": True}
    return with_gradients(*reference_ssd(SsdInputs(**fields)), leaves)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients(shape: Shape, mode: str) -> None:
    inputs, gap = make(shape, mode)
    truth = truth_of(inputs, gap)
    # Relative to the largest entry. Measured: 3e-15 and 2e-6.
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 5e-6)):
        found = run("chunked", inputs, gap, dtype)
        for name, expected in truth.items():
            error = (found[name].double() - expected).abs().max()
            assert error <= tolerance * expected.abs().max(), (name, dtype, float(error))


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.usefixtures("small_chunks")
def test_every_backend_has_the_op(backend: str) -> None:
    inputs, gap = make((2, 11, 4, 3, 2, 5), "gap+delta")
    truth, found = truth_of(inputs, gap), run(backend, inputs, gap, torch.float32)
    for name, expected in truth.items():
        assert (found[name].double() - expected).abs().max() <= 5e-6 * expected.abs().max(), name  # as above


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("mode", MODES)
def test_gradcheck(mode: str) -> None:
    use_backend("chunked")
    inputs, gap = make((1, 7, 2, 2, 1, 2), mode)
    names = list(inputs)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = dict(zip(names, values, strict=True))
        return ssd_scan(**given, gap=gap)

    assert torch.autograd.gradcheck(scan, [value.requires_grad_() for value in inputs.values()])


@settings(max_examples=25)
@given(data=st.data())
def test_two_scans_with_the_state_between_them_are_one(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 150))
    cut = data.draw(st.integers(0, length))
    inputs: dict[str, Any] = make((1, length, 2, 3, 1, 4), "shift", seed=length)[0]
    whole, last = ssd_scan(**inputs)
    per_token = ("x", "dt", "B", "C", "shift")
    first, second = (
        {name: value[:, part] if name in per_token else value for name, value in inputs.items()}
        for part in (slice(0, cut), slice(cut, length))
    )
    early, second["initial_state"] = ssd_scan(**first)
    late, state = ssd_scan(**second)
    torch.testing.assert_close(torch.cat((early, late), dim=1), whole, rtol=0, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=0, atol=1e-11)


@settings(max_examples=25)
@given(data=st.data())
def test_the_short_aligned_scan_is_the_full_scan_without_the_pruned_inputs(data: st.DataObject) -> None:
    """The definition of alignment: with the pruned tokens' true steps in `shift`, nothing else is lost."""
    length = data.draw(st.integers(2, 100))
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, length - 1), min_size=1))))
    inputs: dict[str, Any] = make((1, length, 2, 3, 1, 4), "plain", seed=length)[0]
    pruned = torch.ones(length, dtype=torch.bool).index_fill(0, kept, False)
    full, _ = ssd_scan(**{**inputs, "x": inputs["x"].masked_fill(pruned[None, :, None, None], 0)})
    lost = torch.nn.functional.softplus(inputs["dt"] + inputs["dt_bias"]) * pruned[None, :, None]
    sums = lost.cumsum(dim=1)[:, kept]
    shift = sums.diff(dim=1, prepend=torch.zeros_like(sums[:, :1]))
    short = {name: value[:, kept] if name in ("x", "dt", "B", "C") else value for name, value in inputs.items()}
    torch.testing.assert_close(ssd_scan(**short, shift=shift)[0], full[:, kept], rtol=0, atol=1e-10)


def test_it_is_the_selective_scan_with_one_step_and_rate_a_head() -> None:
    inputs, gap = make((2, 70, 3, 4, 1, 5), "gap")
    given: dict[str, Any] = inputs
    y, state = ssd_scan(**given, gap=gap)
    dt, A, D, bias = (inputs[name].repeat_interleave(4, dim=-1) for name in ("dt", "A", "D", "dt_bias"))
    u, start = inputs["x"].flatten(2), inputs["initial_state"].flatten(1, 2)
    b, c = inputs["B"][:, :, 0], inputs["C"][:, :, 0]
    rates = A[:, None].expand(-1, 5).contiguous()
    expected = selective_scan(u, dt, rates, b, c, D, None, bias, gap=gap, initial_state=start, return_state=True)
    torch.testing.assert_close((y.flatten(2), state.flatten(1, 2)), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shift", [1e4, 1e20])
def test_a_huge_shift_clears_the_state_and_no_more(shift: float) -> None:
    """What comes after it is as exact as if the sequence began there: no sum of exponents has lost its digits."""
    inputs: dict[str, Any] = {name: value.float() for name, value in make((1, 90, 2, 3, 1, 4), "plain")[0].items()}
    gaps = torch.zeros(1, 90, 2)
    gaps[:, 20] = shift
    y, state = ssd_scan(**inputs, shift=gaps)
    later = {name: value[:, 20:] if name in ("x", "dt", "B", "C") else value for name, value in inputs.items()}
    later["initial_state"] = torch.zeros_like(inputs["initial_state"])
    expected = ssd_scan(**later)
    torch.testing.assert_close((y[:, 20:], state), expected, rtol=1e-5, atol=1e-5)


def test_long_scans_stay_accurate() -> None:
    """Slow decays over 4,096 tokens compound every error."""
    inputs, _ = make((1, 4096, 2, 2, 1, 4), "plain")
    given: dict[str, Any] = inputs | {"A": torch.tensor([-1e-3, -1e-2], dtype=torch.float64)}
    single: dict[str, Any] = {name: value.float() for name, value in given.items()}
    truth, found = ssd_scan(**given)[0], ssd_scan(**single)[0].double()
    use_backend("reference")
    own = ssd_scan(**single)[0].double()
    # Root mean squares: the largest error alone is a matter of luck. Measured: 0.5 times.
    assert (found - truth).square().mean() <= (2**2) * (own - truth).square().mean()


def test_half_precision_is_rounded_once() -> None:
    inputs, _ = make((2, 70, 4, 3, 2, 5), "shift")
    parameters = ("A", "D", "dt_bias", "initial_state")
    given: dict[str, Any] = {n: v.float() if n in parameters else v.bfloat16() for n, v in inputs.items()}
    y, state = ssd_scan(**given)
    wide: dict[str, Any] = {name: value.double() for name, value in given.items()}
    truth, last = ssd_scan(**wide)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert (y.double() - truth).abs().max() <= 2**-8 * truth.abs().max()  # 8 bits
    assert (state - last).abs().max() <= 5e-6 * last.abs().max()  # as float32 above


def test_a_broken_token_shows_in_its_head_and_from_it_on() -> None:
    inputs: dict[str, Any] = make((1, 80, 2, 3, 1, 4), "plain")[0]
    for name in ("x", "dt"):
        broken = inputs[name].clone()
        broken[0, 70, 1] = torch.nan
        lost = ssd_scan(**{**inputs, name: broken})[0].isnan()
        # Chunks are computed as a whole: tokens before it in its own chunk are lost with it, no other ones.
        assert lost[0, 70:, 1].all() and not lost[:, :, 0].any() and not lost[:, :64].any()


def test_a_sequence_without_tokens_passes_the_state_on() -> None:
    inputs: dict[str, Any] = {n: v.requires_grad_() for n, v in make((2, 0, 2, 3, 1, 4), "plain")[0].items()}
    for backend in ("reference", "chunked"):
        use_backend(backend)
        y, state = ssd_scan(**inputs)
        assert y.shape == (2, 0, 2, 3) and torch.equal(state, inputs["initial_state"])
        (gradient,) = torch.autograd.grad(state.sum(), inputs["initial_state"])
        assert torch.equal(gradient, torch.ones_like(gradient))


def test_opcheck_and_compile() -> None:
    inputs, gap = make((1, 6, 4, 3, 2, 5), "gap+delta")
    leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in inputs.items()}
    fields: dict[str, Any] = dict.fromkeys(SSD_GRADIENTS) | leaves | {"gap": gap, "dt_softplus": True}
    torch.library.opcheck(torch.ops.ssmprune.ssd_scan, tuple(SsdInputs(**fields)))
    compiled = torch.compile(ssd_scan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**leaves, gap=gap), ssd_scan(**leaves, gap=gap), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's, of its own pytree
def test_exported_programs_have_it_in_pytorch_operators() -> None:
    inputs = make((1, 6, 4, 3, 2, 5), "shift")[0]
    names = list(inputs)

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> tuple[Tensor, Tensor]:
            given: dict[str, Any] = dict(zip(names, values, strict=True))
            return ssd_scan(**given)

    program = torch.export.export(Module(), tuple(inputs.values())).run_decompositions(PLAIN)
    assert not any("ssmprune" in str(node.target) for node in program.graph.nodes)
    found = program.module()(*inputs.values())
    torch.testing.assert_close(found, Module()(*inputs.values()), rtol=0, atol=1e-12)


def test_torch_counts_twice_the_multiply_adds() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for length, chunk in ((5, 5), (100, 64)):
        inputs: dict[str, Any] = make((2, length, 4, 3, 2, 7), "shift")[0]
        with FlopCounterMode(display=False) as counter:
            ssd_scan(**inputs)
        by_hand = 2 * length * (2 * chunk * 7 + 4 * (3 * (chunk + 2 * 7 + 1) + 1))
        assert counter.get_total_flops() == 2 * by_hand
        assert ssd_flops(2, length, 4, 3, 2, 7, has_D=True, aligned=True) == by_hand


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5, 12)}, "x must have shape"),
        ({"dt": torch.zeros(2, 5, 3)}, "dt has shape"),
        ({"A": torch.zeros(4, 7)}, "A has shape"),
        ({"B": torch.zeros(2, 5, 3, 7)}, "4 heads cannot share 3 groups"),
        ({"B": torch.zeros(2, 5, 0, 7)}, "4 heads cannot share 0 groups"),
        ({"C": torch.zeros(2, 5, 2, 6)}, "C has shape"),
        ({"D": torch.zeros(4, dtype=torch.float64)}, "D is torch.float64"),
        ({"C": torch.zeros(2, 5, 2, 7, device="meta")}, "C is on meta"),
        ({"shift": torch.zeros(2, 5, 4), "gap": torch.zeros(2, 5)}, "exclude"),
        ({"gap_delta": torch.zeros(4)}, "needs gap"),
        ({"initial_state": torch.zeros(2, 4, 7, 3)}, "initial_state has shape"),
        ({"initial_state": torch.zeros(2, 4, 3, 7).bfloat16()}, "states are torch.float32"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    inputs: dict[str, Any] = {name: value.float() for name, value in make((2, 5, 4, 3, 2, 7), "plain")[0].items()}
    with pytest.raises(KernelError, match=message):
        ssd_scan(**{**inputs, **change})


@pytest.mark.parametrize("backend", AVAILABLE)
def test_autocast_does_not_reach_into_scans(backend: str) -> None:
    """Their products, and those of their gradients, would be in bfloat16: 4e-3 off, and so would the state."""
    use_backend(backend)
    scans: list[tuple[Callable[..., tuple[Tensor, Tensor]], dict[str, Tensor]]] = [
        (ssd_scan, make((1, 70, 2, 3, 1, 4), "plain")[0]),
        (scan_and_state, narrow_scan()),
    ]
    for scan, inputs in scans:
        leaves: dict[str, Any] = {name: value.float().requires_grad_() for name, value in inputs.items()}
        expected = with_gradients(*scan(**leaves), leaves)
        with torch.autocast("cpu", torch.bfloat16):
            found = with_gradients(*scan(**leaves), leaves)
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def scan_and_state(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return selective_scan(u, delta, A, B, C, return_state=True)


def narrow_scan() -> dict[str, Tensor]:
    """Inputs of `selective_scan`."""
    u, delta, B, C = torch.randn(4, 1, 70, 4, generator=torch.Generator().manual_seed(0)).unbind()
    return {"u": u, "delta": delta, "A": -torch.ones(4, 4), "B": B, "C": C}
