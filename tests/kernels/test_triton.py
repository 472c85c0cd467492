"""The Triton kernels: under Triton's interpreter on the CPU, compiled on a GPU, against the float64 reference.

Triton decides when it is imported whether kernels are interpreted, so on a machine without a GPU these tests are
skipped at first; `test_under_the_interpreter` runs them in a process of its own that asks for the interpreter.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ssmprune_cli.kernels import (
    active_backend,
    causal_conv1d,
    selective_scan,
    use_backend,
)
from ssmprune_cli.kernels.choice import BACKENDS, pick
from ssmprune_cli.kernels.inputs import GRADIENTS, ScanInputs
from ssmprune_cli.kernels.triton import backend as triton_backend
from ssmprune_cli.kernels.triton import conv_launch as triton_conv_launch
from ssmprune_cli.kernels.triton.backend import TRITON, interpreted
from ssmprune_cli.models.mamba.causal_sources import conv_sources
from ssmprune_cli.tokens import Dropped, TokenSequence

ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if interpreted() else "cuda"
MODES = ["plain", "shift", "gap", "gap+delta"]
PARAMETERS = ("A", "D", "delta_bias", "gap_delta")

kernels = pytest.mark.skipif(
    TRITON.missing() is not None, reason="test_under_the_interpreter runs it, as there is no GPU for Triton"
)
gpu = pytest.mark.skipif(not torch.cuda.is_available() or interpreted(), reason="needs a CUDA device")


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences with few channels cross every border: of channel blocks, segments and groups."""
    monkeypatch.setattr(triton_backend, "TILE", 16)
    monkeypatch.setattr(triton_backend, "SEGMENT", 4)


def make(
    shape: tuple[int, int, int, int], mode: str, dtype: torch.dtype, extras: bool = True
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs in float64 whose values `dtype` holds exactly, and the gap."""
    batch, length, channels, state = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype).double()

    wide, narrow = (batch, length, channels), (batch, length, state)
    inputs = {"u": normal(*wide), "delta": normal(*wide), "A": -normal(channels, state).exp().float().double()}
    inputs |= {"B": normal(*narrow), "C": normal(*narrow)}
    if extras:
        inputs |= {"D": normal(channels), "z": normal(*wide), "delta_bias": normal(channels)}
    if mode == "shift":
        inputs["shift"] = normal(*wide).abs()
    if mode == "gap+delta":
        inputs["gap_delta"] = normal(channels).abs()
    gap = torch.randint(0, 4, (batch, length), generator=generator).double() if mode.startswith("gap") else None
    return inputs, gap


def run(
    backend: str,
    inputs: dict[str, Tensor],
    gap: Tensor | None,
    dtypes: tuple[torch.dtype, torch.dtype],
    reverse: bool,
    device: str = DEVICE,
) -> dict[str, Tensor]:
    """y and all gradients; `dtypes` of the activations and of the parameters."""
    given: dict[str, Any] = {name: value.to(device, dtypes[name in PARAMETERS]) for name, value in inputs.items()} | {
        "gap": None if gap is None else gap.to(device, dtypes[0])
    }
    absent = dict.fromkeys(("D", "z", "delta_bias", "shift", "gap_delta"))
    scan = ScanInputs(**{**absent, **given}, delta_softplus=True, reverse=reverse)
    y = BACKENDS.get(backend).scan(scan)
    grad = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).to(torch.bfloat16).view_as(y).to(y)
    gradients = dict(zip(GRADIENTS, BACKENDS.get(backend).scan_backward(grad, scan), strict=True))
    found = {"y": y}
    for name in GRADIENTS:
        value = gradients[name]
        assert (value is None) == (name not in inputs)
        if value is not None:
            assert value.dtype == dtypes[name in PARAMETERS]
            found[name] = value
    return found


def compare(found: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float) -> None:
    """The largest error, in units of the largest entry."""
    for name, expected in truth.items():
        error = (found[name].double() - expected.to(found[name].device)).abs().max()
        assert error <= tolerance * expected.abs().max(), (name, float(error / expected.abs().max()))


SINGLE = (torch.float32, torch.float32)
DOUBLE = (torch.float64, torch.float64)
# Of the largest entry. float32: measured 1e-6 under the interpreter, whose exp is exact to rounding; that of a GPU has
# an error of 2^-22 a step. bfloat16: one rounding of the result to 8 bits, which the interpreter cuts off instead.
TOLERANCE = (
    {torch.float32: 2e-6, torch.bfloat16: 2**-7} if interpreted() else {torch.float32: 2e-5, torch.bfloat16: 2**-8}
)


@kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_values_and_gradients_in_float32(mode: str, reverse: bool) -> None:
    """Odd length, a number of states that is no power of two, channels that do not fill a block."""
    inputs, gap = make((2, 5, 6, 3), mode, torch.float32, extras=not reverse or mode == "shift")
    truth = run("reference", inputs, gap, DOUBLE, reverse)
    compare(run("triton", inputs, gap, SINGLE, reverse), truth, TOLERANCE[torch.float32])


@kernels
@pytest.mark.parametrize("shape", [(1, 1, 3, 16), (3, 2, 1, 1), (1, 9, 2, 5)], ids=str)
def test_shapes_at_the_edge(shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "SEGMENT", 4)
    inputs, gap = make(shape, "gap+delta", torch.float32)
    truth = run("reference", inputs, gap, DOUBLE, True)
    compare(run("triton", inputs, gap, SINGLE, True), truth, TOLERANCE[torch.float32])


@kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reverse", [False, True])
def test_groups_of_tokens_side_by_side(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long scan of few channels is split; here into 4 groups, the last one shorter."""
    monkeypatch.setattr(triton_backend, "SHORTEST_GROUP", 4)
    inputs, gap = make((1, 14, 3, 2), "gap", torch.float32)
    truth = run("reference", inputs, gap, DOUBLE, reverse)
    compare(run("triton", inputs, gap, SINGLE, reverse), truth, TOLERANCE[torch.float32])


@kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("group", [4, 8, 12, 16])
def test_groups_of_every_length(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of channels; a last group of one token, and one that is full."""
    monkeypatch.setattr(triton_backend, "_groups", lambda programs, length, device: -(-length // group))
    for length in (group + 1, 2 * group):
        inputs, gap = make((1, length, 1, 2), "gap+delta", torch.float32)
        truth = run("reference", inputs, gap, DOUBLE, length % 2 == 0)
        compare(run("triton", inputs, gap, SINGLE, length % 2 == 0), truth, TOLERANCE[torch.float32])


def test_a_scan_is_split_when_it_cannot_fill_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a card of 10 multiprocessors, for 80 programs at a time."""
    card = SimpleNamespace(multi_processor_count=10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    groups = partial(triton_backend._groups, device=torch.device("cuda"))
    assert groups(programs=80, length=4096) == 1
    assert groups(programs=40, length=4096) == 2
    assert groups(programs=40, length=200) == 1  # two groups would be too short to pay
    assert groups(programs=1, length=65536) == 80
    assert groups(programs=1, length=33) == 2  # most of the card would stand idle: short groups pay


@kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("length", [1, 5, 14])
@pytest.mark.parametrize("reverse", [False, True])
def test_states_go_in_and_out(length: int, reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one token, of one group, and of 4 groups of tokens, the last one shorter."""
    monkeypatch.setattr(triton_backend, "SHORTEST_GROUP", 4)
    inputs, gap = make((1, length, 3, 3), "gap+delta", torch.float32)
    inputs["initial_state"] = torch.linspace(-1, 1, 9, dtype=torch.float64).view(1, 3, 3)
    results = []
    for backend, dtype, device in (("reference", torch.float64, "cpu"), ("triton", torch.float32, DEVICE)):
        use_backend(backend)
        leaves: dict[str, Any] = {name: value.to(device, dtype).requires_grad_() for name, value in inputs.items()}
        given = {**leaves, "gap": None if gap is None else gap.to(device), "reverse": reverse, "return_state": True}
        y, state = selective_scan(**given)
        weights = [torch.linspace(-1, 1, each.numel()).view_as(each).to(each) for each in (y, state)]
        gradients = torch.autograd.grad([y, state], list(leaves.values()), weights)
        results.append({"y": y, "state": state, **dict(zip(leaves, gradients, strict=True))})
    compare(results[1], results[0], TOLERANCE[torch.float32])


@kernels
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["shift", "gap+delta"])
def test_values_and_gradients_in_bfloat16(mode: str, parameters: torch.dtype) -> None:
    """All arithmetic is in float32: what is left is the last rounding."""
    inputs, gap = make((2, 5, 6, 3), mode, torch.bfloat16)
    inputs["A"] = inputs["A"].to(parameters).double()
    truth = run("reference", inputs, gap, DOUBLE, False)
    found = run("triton", inputs, gap, (torch.bfloat16, parameters), False)
    compare(found, truth, TOLERANCE[torch.bfloat16])
    if parameters == torch.float32:  # sums over tokens are not rounded in between
        names = [name for name in truth if name in PARAMETERS]
        compare({n: found[n] for n in names}, {n: truth[n] for n in names}, TOLERANCE[torch.float32])


@kernels
def test_slices_of_a_projection_are_read_in_place() -> None:
    use_backend("triton")
    wide = torch.randn(2, 3, 40, device=DEVICE)
    u, delta, b, c, z, shift = wide.split([4, 4, 12, 12, 4, 4], dim=-1)
    A = -torch.rand(4, 12, device=DEVICE)
    expected = selective_scan(
        u.contiguous(), delta.contiguous(), A, b.contiguous(), c.contiguous(), z=z.contiguous(), shift=shift.abs()
    )
    assert torch.equal(selective_scan(u, delta, A, b, c, z=z, shift=shift.abs()), expected)
    flipped = u.transpose(1, 2).contiguous().transpose(1, 2)  # no dense innermost dimension: copied
    assert torch.equal(selective_scan(flipped, delta, A, b, c, z=z, shift=shift.abs()), expected)
    weight, bias = torch.randn(4, 3, device=DEVICE), torch.randn(4, device=DEVICE)
    assert torch.equal(causal_conv1d(u, weight, bias), causal_conv1d(u.contiguous(), weight, bias))


@kernels
def test_huge_shifts_clear_the_state_and_broken_tokens_show() -> None:
    use_backend("triton")
    u, b = torch.ones(1, 3, 2, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    A, shift = -torch.ones(2, 4, device=DEVICE), torch.full_like(u, 1e20)
    # Nothing of the past is left: every token reads its own drive, softplus(1) a state.
    expected = torch.full_like(u, 4 * 1.3132617)
    torch.testing.assert_close(selective_scan(u, u, A, b, b, shift=shift), expected, rtol=1e-6, atol=0)
    broken = u.clone()
    broken[0, 1, 0] = torch.nan
    for given in ((broken, u), (u, broken)):
        lost = selective_scan(*given, A, b, b).isnan()
        assert lost[0, 1:, 0].all() and lost.sum() == 2


@kernels
@pytest.mark.parametrize(
    ("shape", "width"), [((2, 40, 5), 4), ((1, 1, 70), 3), ((3, 2, 3), 1), ((1, 7, 3), 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_convolution(
    shape: tuple[int, int, int], width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tiles of tokens in two programs; five taps are more than the kernel takes."""
    monkeypatch.setattr(triton_conv_launch, "ENOUGH_PROGRAMS", 3)
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (shape[-1], width), shape[-1:])
    values = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    grad = torch.randn(shape, generator=generator).to(dtype)
    for reverse, single in itertools.product((False, True), repeat=2):
        kinds = (dtype, *(torch.float32 if single else dtype,) * 2)  # parameters may stay in float32
        results = []
        for backend, precision in (("reference", (torch.float64,) * 3), ("triton", kinds)):
            x, weight, bias = (v.to(DEVICE, kind) for v, kind in zip(values, precision, strict=True))
            y = BACKENDS.get(backend).conv(x, weight, bias, reverse)
            results.append((y, *BACKENDS.get(backend).conv_backward(grad.to(y), x, weight, bias, reverse)))
        for expected, found, kind in zip(*results, (dtype, *kinds), strict=True):
            assert found.dtype == kind
            # A few roundings: of the sum over taps, the SiLU and its slope; bfloat16: of the result alone.
            assert (found.double() - expected).abs().max() <= TOLERANCE[kind] * expected.abs().max()


def sources_of(kind: str, kept: tuple[int, int, int], dropped: int, width: int) -> Tensor:
    """What taps of a forward or reverse convolution meet when some tokens of a dense sequence are left, or anything."""
    generator = torch.Generator().manual_seed(0)
    batch, live, _ = kept
    if kind == "any":  # with repeats
        return torch.randint(-1, live + dropped, (batch, live, width), generator=generator)
    ranks = torch.rand(batch, live + dropped, generator=generator).argsort(dim=1)[:, :live].sort(dim=1).values
    sequence = TokenSequence.dense(torch.zeros(batch, live + dropped, 1)).keep(ranks, others="context")
    if sequence.context is None:
        sequence = replace(sequence, context=Dropped(torch.zeros(batch, 0, 1), ranks[:, :0]))
    return conv_sources(sequence, width)[int(kind == "reverse")]


@kernels
@pytest.mark.parametrize(
    ("kept", "dropped", "width"),
    [
        ((1, 35, 70), 9, 4),
        ((2, 3, 5), 31, 3),
        ((2, 2, 3), 0, 3),
        pytest.param((64, 99, 384), 98, 4, marks=[gpu, pytest.mark.slow]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_convolution(kept: tuple[int, int, int], dropped: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    batch, _, channels = kept
    sizes = (kept, (batch, dropped, channels), (channels, width), (channels,))
    values = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    grad = torch.randn(kept, generator=generator).to(dtype)
    for kind, single in (("forward", False), ("reverse", True), ("any", False)):
        sources = sources_of(kind, kept, dropped, width).to(DEVICE)
        kinds = (*(dtype,) * 2, *(torch.float32 if single else dtype,) * 2)  # parameters may stay in float32
        results = []
        for backend, precision in (("reference", (torch.float64,) * 4), ("triton", kinds)):
            x, context, *others = (v.to(DEVICE, kind) for v, kind in zip(values, precision, strict=True))
            if backend == "triton":  # a half of a projection, without and with its dense innermost dimension
                x = torch.cat((x, x), dim=2)[..., :channels]
                context = context.transpose(1, 2).contiguous().transpose(1, 2) if single else context.repeat(1, 1, 2)
                context = context[..., :channels]
            y = BACKENDS.get(backend).sparse_conv(x, context, sources, others[0], others[1])
            gradients = BACKENDS.get(backend).sparse_conv_backward(grad.to(y), x, context, sources, *others)
            results.append((y, *gradients))
        for expected, found, precise in zip(*results, (dtype, *kinds), strict=True):
            assert found.dtype == precise and found.shape == expected.shape
            if expected.numel():
                assert (found.double() - expected).abs().max() <= TOLERANCE[precise] * expected.abs().max()


@kernels
def test_sparse_convolution_without_tokens_and_of_rows_that_do_not_exist() -> None:
    weight, bias = torch.randn(3, 4, device=DEVICE), torch.randn(3, device=DEVICE)
    for batch, live in ((0, 2), (2, 0)):
        x, context = torch.ones(batch, live, 3, device=DEVICE), torch.ones(batch, 5, 3, device=DEVICE)
        sources = torch.zeros(batch, live, 4, dtype=torch.int64, device=DEVICE)
        assert TRITON.sparse_conv(x, context, sources, weight, bias).shape == x.shape
        found = TRITON.sparse_conv_backward(x, x, context, sources, weight, bias)
        for gradient, given in zip(found, (x, context, weight, bias), strict=True):
            assert gradient.shape == given.shape and not gradient.any()
    x, sources = torch.ones(1, 1, 3, device=DEVICE), torch.tensor([[[-2, 2, 10**12, -1]]], device=DEVICE)
    torch.testing.assert_close(TRITON.sparse_conv(x, x, sources, weight, bias)[0, 0], torch.nn.functional.silu(bias))
    d_x, d_context, d_weight, d_bias = TRITON.sparse_conv_backward(x, x, x, sources, weight, bias)
    assert not d_x.any() and not d_context.any() and not d_weight.any() and d_bias.all()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", [False, True])
def test_add_rms_norm(dtype: torch.dtype, first: bool) -> None:
    """70 rows are more than one program's; 20 channels fill no tile."""
    generator = torch.Generator().manual_seed(0)
    hidden, residual, d_normed, d_stream = (torch.randn(2, 35, 20, generator=generator).to(dtype) for _ in range(4))
    weight = torch.randn(20, generator=generator)
    results = []
    for backend, wide in (("reference", torch.float64), ("triton", torch.float32)):
        kind = wide if backend == "reference" else dtype
        own = BACKENDS.get(backend)
        w, before = weight.to(DEVICE, wide), None if first else residual.to(DEVICE, wide)
        normed, stream = own.add_rms_norm(hidden.to(DEVICE, kind), before, w, 1e-3)
        gradients = own.add_rms_norm_backward(d_normed.to(DEVICE, wide), d_stream.to(DEVICE, wide), stream, w, 1e-3)
        results.append((normed, stream, *gradients))
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found.double() - expected).abs().max() <= TOLERANCE[torch.float32] * expected.abs().max()


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 2, 4, 5])
def test_gated_sum(dtype: torch.dtype, count: int) -> None:
    """z is half of a projection: its rows are apart. Five terms are more than the kernel takes."""
    generator = torch.Generator().manual_seed(0)
    *ys, grad = (torch.randn(2, 35, 20, generator=generator).to(dtype) for _ in range(count + 1))
    z = torch.randn(2, 35, 40, generator=generator).to(dtype)
    results = []
    for backend, kind in (("reference", torch.float64), ("triton", dtype)):
        own, gate = BACKENDS.get(backend), z.to(DEVICE, kind)[..., 20:]
        given = [y.to(DEVICE, kind) for y in ys]
        results.append(
            (own.gated_sum(given, gate, 0.5), *own.gated_sum_backward(grad.to(DEVICE, kind), given, gate, 0.5))
        )
    for expected, found in zip(*results, strict=True):
        assert found.dtype == dtype
        assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@kernels
def test_empty_batches_and_the_interpreter_is_never_chosen() -> None:
    inputs, gap = make((0, 3, 2, 2), "gap", torch.float32)
    found = run("triton", inputs, gap, SINGLE, False)
    assert found["y"].shape == (0, 3, 2) and not found["A"].any()
    use_backend("auto")
    assert active_backend() != "triton"
    assert (pick(torch.zeros(1, device=DEVICE), 16).name == "triton") == (DEVICE == "cuda")


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="it is this run")
def test_under_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("SSMPRUNE_BACKEND", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_without_triton_or_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert TRITON.missing() == "the package triton is not installed"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert TRITON.missing() == "there is no CUDA device"
    assert not TRITON.accepts(torch.zeros(1), 16)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert TRITON.missing() is None and TRITON.accepts(torch.zeros(1), 16) and not TRITON.automatic


@gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "shape", [(1, 197, 384, 16), (256, 99, 384, 16), (1, 16384, 64, 16), (5, 4099, 40, 24)], ids=str
)
@pytest.mark.parametrize("mode", MODES)
def test_large_shapes_on_a_gpu(shape: tuple[int, int, int, int], mode: str) -> None:
    for reverse, dtype in itertools.product((False, True), (torch.float32, torch.bfloat16)):
        inputs, gap = make(shape, mode, dtype)
        truth = run("chunked", inputs, gap, DOUBLE, reverse)
        found = run("triton", inputs, gap, (dtype, torch.float32), reverse)
        compare(found, truth, 1e-4 if dtype == torch.float32 else 2**-7)


@gpu
@pytest.mark.slow
def test_tensors_with_more_entries_than_int32_counts() -> None:
    """256 x 16,384 x 768: offsets need 64 bits."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    use_backend("triton")
    u = torch.randn(1, 16384, 768, device=DEVICE, dtype=torch.bfloat16).repeat(256, 1, 1)
    b = torch.randn(1, 16384, 16, device=DEVICE, dtype=torch.bfloat16).repeat(256, 1, 1)
    A = -torch.rand(768, 16, device=DEVICE)
    y = selective_scan(u, u, A, b, b)
    assert torch.equal(y[-1], y[0]) and y[0].isfinite().all() and y[0].any()


@gpu
@pytest.mark.slow
def test_a_pruned_model_is_captured_in_a_cuda_graph() -> None:
    from ssmprune_cli.models.mamba.vim import Vim, VimConfig
    from ssmprune_cli.pruning import compress

    use_backend("triton")
    model = Vim(VimConfig(image_size=(64, 64), depth=4)).eval().cuda()
    compress(model, 0.5, points=[1, 2], alignment="null")
    images = torch.randn(2, 3, 64, 64, device=DEVICE)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(images)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = model(images)
        images.copy_(torch.randn_like(images))
        graph.replay()
        # Same kernels on the same values; only cuBLAS may choose another algorithm inside a graph.
        torch.testing.assert_close(logits, model(images), rtol=1e-4, atol=1e-5)
