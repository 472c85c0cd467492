"""The ops of a prune point: by hand, against float64, and the kernels in C and Triton against PyTorch, row by row.

`test_under_the_interpreter` runs the tests of Triton in a process of its own, see test_triton.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import backends_for, move_tokens, order_tokens, score_tokens, use_backend
from ssmprune_cli.kernels.choice import BACKENDS
from ssmprune_cli.kernels.inputs import Moved, MoveInputs, OrderInputs
from ssmprune_cli.kernels.ops.prune import ScoreKind
from ssmprune_cli.kernels.pytorch import prune as truth
from ssmprune_cli.kernels.triton.backend import TRITON, interpreted

ROOT = Path(__file__).parents[2]
DEVICE = "cpu" if interpreted() else "cuda"
KINDS: tuple[ScoreKind, ...] = ("clip", "l1", "l2", "mean")

CPUS = [name for name in backends_for(torch.zeros(1)) if name.startswith("cpu")]  # every level: see conftest.py

kernels = pytest.mark.skipif(TRITON.missing() is not None, reason="test_under_the_interpreter runs it")

BY_HAND: dict[ScoreKind, Callable[[Tensor], Tensor]] = {
    "clip": lambda y: y.clamp(min=0).mean(dim=-1),
    "l1": lambda y: y.abs().mean(dim=-1),
    "l2": lambda y: y.square().mean(dim=-1).sqrt(),
    "mean": lambda y: y.mean(dim=-1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=kernels)])
def test_scores_against_float64(backend: str, kind: ScoreKind) -> None:
    """Also of half precision, whose sum over directions is not rounded; channels that fill no tile; a NaN."""
    use_backend(backend)
    for dtype, shape, count in (
        (torch.float32, (2, 3, 37), 2),
        (torch.bfloat16, (1, 1, 5), 4),
        (torch.float16, (3, 2, 1), 1),
    ):
        ys = [torch.randn(shape).to(DEVICE if backend == "triton" else "cpu", dtype) for _ in range(count)]
        score = score_tokens(ys, kind)
        expected = BY_HAND[kind](torch.stack(ys).double().sum(dim=0))
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-6)  # sums of up to 37 in float32
    ys[0][1, 1] = float("nan")
    assert score_tokens(ys, kind).isnan().nonzero().tolist() == [[1, 1]]


@kernels
def test_a_score_of_more_channels_than_a_tile() -> None:
    ys = [torch.randn(1, 2, 1500, device=DEVICE) for _ in range(2)]
    use_backend("triton")
    torch.testing.assert_close(
        score_tokens(ys, "clip").double(), BY_HAND["clip"](ys[0].double() + ys[1]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 37), (3, 40, 768)], ids=str)
def test_scores_in_c(backend: str, kind: ScoreKind, shape: tuple[int, int, int]) -> None:
    """Channels that fill no vector; terms that lie apart in memory; enough values for threads."""
    for count in (1, 2, 4, 5):
        ys = [torch.randn(shape[0], shape[2], shape[1]).transpose(1, 2) for _ in range(count)]
        expected = BY_HAND[kind](torch.stack(ys).double().sum(dim=0))
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(BACKENDS.get(backend).score_tokens(ys, kind))
        assert torch.equal(*found)
        # What is rounded are the terms, and a mean of both signs may be far smaller than they are.
        scale = expected.abs().max() if kind != "mean" else BY_HAND["l1"](torch.stack(ys).double()).sum(dim=0).max()
        assert (found[0].double() - expected).abs().max() <= 1e-6 * scale


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_score_of_what_is_no_number(backend: str, kind: ScoreKind) -> None:
    ys = [torch.ones(1, 4, 70), torch.zeros(1, 4, 70)]
    ys[0][0, 0, 69], ys[1][0, 1, 3], ys[1][0, 2, 3] = float("nan"), float("-inf"), float("inf")
    found, expected = BACKENDS.get(backend).score_tokens(ys, kind), truth.score_tokens(ys, kind)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert BACKENDS.get(backend).score_tokens([torch.ones(2, 0, 3)], kind).shape == (2, 0)


# Few values, so that most are equal; both zeros; the smallest and largest; infinities and NaN.
AWKWARD = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4028234663852886e38, float("inf"), float("-inf"), float("nan")]
)
SCORES = st.one_of(AWKWARD, st.floats(width=32))


@st.composite
def orders(draw: st.DrawFn) -> OrderInputs:
    length, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    values = draw(st.lists(SCORES, min_size=batch * length, max_size=batch * length))
    first = draw(st.integers(0, 3))  # positions need not begin at 0
    positions = torch.arange(first, first + 2 * length, 2).expand(batch, -1)
    protected = draw(st.sets(st.integers(first, first + 2 * length - 1), max_size=3))
    live = None
    if draw(st.booleans()):
        live = torch.tensor(draw(st.lists(st.booleans(), min_size=length, max_size=length))).expand(batch, -1)
    score = torch.tensor(values).view(batch, length)
    return OrderInputs(score, positions, live, sorted(protected), draw(st.integers(0, length)), draw(st.booleans()))


@kernels
@settings(max_examples=25)
@given(orders())
def test_the_order_is_that_of_pytorch(inputs: OrderInputs) -> None:
    """The same tokens stay, ties, zeros of both signs and NaN included."""
    given_ = inputs._replace(
        score=inputs.score.to(DEVICE),
        positions=inputs.positions.to(DEVICE),
        live=None if inputs.live is None else inputs.live.to(DEVICE),
    )
    assert torch.equal(TRITON.order_tokens(given_).cpu(), truth.order_tokens(inputs))


@pytest.mark.parametrize("backend", CPUS)
@settings(max_examples=150)
@given(orders())
def test_the_order_in_c(backend: str, inputs: OrderInputs) -> None:
    expected = truth.order_tokens(inputs)
    found = BACKENDS.get(backend).order_tokens(inputs)
    assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_an_order_of_many_tokens_in_c(backend: str, dtype: torch.dtype) -> None:
    """In several threads, of scores and positions that lie apart in memory; in bfloat16 most have an equal."""
    torch.set_num_threads(3)
    score = torch.randn(2051, 8).to(dtype).t()
    positions = torch.randperm(2 * 2051)[: 8 * 2051 // 4].view(2, 2051).repeat(4, 1).repeat_interleave(2, 1)[:, ::2]
    live = (torch.rand(2051, 8) < 0.3).t()
    for count in (0, 1, 700, 2050, 2051):
        for others in (False, True):
            inputs = OrderInputs(score, positions, live, [5, 4000], count, others)
            assert torch.equal(BACKENDS.get(backend).order_tokens(inputs), truth.order_tokens(inputs))
    empty = OrderInputs(score[:, :0], positions[:, :0], None, [3], 0, True)
    assert BACKENDS.get(backend).order_tokens(empty).shape == (8, 0)


@kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_order_of_many_tokens(dtype: torch.dtype) -> None:
    """4,099 in one program; in bfloat16 most have an equal."""
    score = torch.randn(1, 4099).to(dtype)
    inputs = OrderInputs(score, torch.arange(4099)[None], None, [7], 1024, others=True)
    given_ = inputs._replace(score=score.to(DEVICE), positions=inputs.positions.to(DEVICE))
    assert torch.equal(TRITON.order_tokens(given_).cpu(), truth.order_tokens(inputs))


def move_inputs(dtype: torch.dtype, dim: int, *, residual: bool, others: bool, older: int, device: str) -> MoveInputs:
    generator = torch.Generator().manual_seed(dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    batch, length, count = 3, 7, 4
    order = torch.stack([torch.randperm(length, generator=generator) for _ in range(batch)])
    order = torch.cat((order[:, :count].sort(dim=1).values, order[:, count:].sort(dim=1).values), dim=1)
    positions = torch.arange(0, 2 * length, 2).expand(batch, -1) + torch.arange(batch)[:, None]
    inputs = MoveInputs(
        normal(batch, length, 2 * dim)[..., :dim],  # rows of something wider
        normal(batch, length, dim).float() if residual else None,
        positions,
        order if others else order[:, :count],
        count,
        normal(batch, older, dim).float() if older else None,
        torch.randint(99, (batch, older), generator=generator) if older else None,
    )
    return MoveInputs._make(value.to(device) if isinstance(value, Tensor) else value for value in inputs)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("residual", "others", "older"),
    [(True, False, 0), (True, True, 0), (True, True, 5), (False, True, 1), (False, False, 0)],
)
def test_the_move_is_that_of_pytorch_bit_for_bit(dtype: torch.dtype, residual: bool, others: bool, older: int) -> None:
    for dim in (1, 37):
        inputs = move_inputs(dtype, dim, residual=residual, others=others, older=older, device=DEVICE)
        same_move(TRITON.move_tokens(inputs), truth.move_tokens(inputs))


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("residual", "others", "older"),
    [(True, False, 0), (True, False, 2), (True, True, 0), (True, True, 5), (False, True, 1), (False, False, 0)],
)
def test_the_move_in_c(backend: str, dtype: torch.dtype, residual: bool, others: bool, older: int) -> None:
    """bfloat16 is PyTorch's. 9,000 channels are enough for threads."""
    torch.set_num_threads(3)
    for dim in (1, 37, 9000):
        inputs = move_inputs(dtype, dim, residual=residual, others=others, older=older, device="cpu")
        apart = inputs._replace(
            hidden=inputs.hidden.transpose(1, 2).contiguous().transpose(1, 2),
            positions=inputs.positions[:1].expand(3, -1),
            order=inputs.order.t().contiguous().t(),
        )
        for each in (inputs, apart):
            same_move(BACKENDS.get(backend).move_tokens(each), truth.move_tokens(each))


@pytest.mark.parametrize("backend", CPUS)
def test_a_move_of_all_or_of_none_in_c(backend: str) -> None:
    inputs = move_inputs(torch.float32, 5, residual=True, others=True, older=2, device="cpu")
    rows = torch.arange(7).expand(3, -1)
    whole = inputs._replace(order=rows, kept=7)
    same_move(BACKENDS.get(backend).move_tokens(whole), truth.move_tokens(whole))
    moved = BACKENDS.get(backend).move_tokens(inputs._replace(order=rows, kept=0))
    assert [each.shape[-2:] for each in moved[:4]] == [(0, 5), (0, 5), (3, 0), (3, 0)]
    assert inputs.residual is not None and inputs.older is not None
    assert torch.equal(moved.dropped, torch.cat((inputs.residual + inputs.hidden, inputs.older), dim=1))
    one = inputs._replace(
        hidden=inputs.hidden[:, :1], residual=None, positions=inputs.positions[:, :1], order=rows[:, :1], kept=1
    )
    same_move(BACKENDS.get(backend).move_tokens(one), truth.move_tokens(one))
    none = one._replace(hidden=inputs.hidden[:, :1, :0], older=None, older_positions=None)
    same_move(BACKENDS.get(backend).move_tokens(none), truth.move_tokens(none))


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("row", [-1, 7, 1 << 62])
def test_a_row_outside_is_refused_by_c(backend: str, row: int) -> None:
    inputs = move_inputs(torch.float32, 5, residual=True, others=True, older=0, device="cpu")
    for place in (0, 6):
        order = inputs.order.clone()
        order[2, place] = row
        with pytest.raises(KernelError, match="order names a row that is not there"):
            BACKENDS.get(backend).move_tokens(inputs._replace(order=order))


def same_move(found: Moved, expected: Moved) -> None:
    for name, one, other in zip(found._fields, found, expected, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def test_a_move_by_hand() -> None:
    hidden, residual = torch.tensor([[[1.0], [2], [3], [4]]]), torch.tensor([[[10.0], [20], [30], [40]]])
    moved = move_tokens(
        hidden,
        residual,
        torch.tensor([[0, 3, 4, 9]]),
        torch.tensor([[0, 1, 3, 2]]),
        3,
        older=torch.tensor([[[7.0]]]),
        older_positions=torch.tensor([[6]]),
    )
    assert moved.hidden.flatten().tolist() == [1, 2, 4] and moved.residual.flatten().tolist() == [10, 20, 40]
    assert moved.positions.tolist() == [[0, 3, 9]] and moved.gaps.tolist() == [[[0, 2, 5]], [[2, 5, 0]]]
    assert moved.dropped.flatten().tolist() == [33, 7] and moved.dropped_positions.tolist() == [[4, 6]]


def of_sines(*tensors: Tensor) -> Tensor:
    return torch.stack([each.sin().sum() for each in tensors]).sum()


@pytest.mark.parametrize("backend", ["auto", pytest.param("triton", marks=kernels)])
def test_gradients_of_a_move_are_those_of_plain_indexing(backend: str) -> None:
    use_backend(backend)
    inputs = move_inputs(
        torch.float32, 5, residual=True, others=True, older=2, device=DEVICE if backend == "triton" else "cpu"
    )
    hidden, residual, positions, order, count, older, places = inputs
    assert residual is not None and older is not None
    leaves = [each.clone().requires_grad_() for each in (hidden, residual, older)]
    moved = move_tokens(leaves[0], leaves[1], positions, order, count, older=leaves[2], older_positions=places)
    found = torch.autograd.grad(of_sines(moved.hidden, moved.residual, moved.dropped), leaves)
    index = order[..., None].expand(-1, -1, 5)
    both = [each.gather(1, index) for each in leaves[:2]]
    dropped = torch.cat((both[0][:, count:] + both[1][:, count:], leaves[2]), dim=1)
    total = of_sines(both[0][:, :count], both[1][:, :count], dropped)
    for one, other in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    only = torch.autograd.grad(
        move_tokens(leaves[0], leaves[1], positions, order[:, :count], count).residual.sum(), leaves[1]
    )[0]
    assert only.sum() == 3 * count * 5


def test_what_does_not_fit_is_named() -> None:
    score, positions = torch.zeros(2, 4), torch.arange(4).expand(2, -1)
    with pytest.raises(KernelError, match="5 of 4 tokens cannot stay"):
        order_tokens(score, positions, (), 5)
    with pytest.raises(KernelError, match=r"positions must be int64 of shape \(2, 4\)"):
        order_tokens(score, positions[:1], (), 2)
    with pytest.raises(KernelError, match="live must be bool"):
        order_tokens(score, positions, (), 2, live=score)
    with pytest.raises(KernelError, match="score must be floating-point"):
        order_tokens(positions, positions, (), 2)
    with pytest.raises(KernelError, match="not 'l3'"):
        score_tokens([torch.zeros(1, 1, 1)], "l3")  # type: ignore[arg-type]
    with pytest.raises(KernelError, match="ys is empty"):
        score_tokens([], "clip")
    hidden = torch.zeros(2, 4, 3)
    with pytest.raises(KernelError, match=r"order must be int64 of shape \(2, 3\)"):
        move_tokens(hidden, None, positions, positions[:, :2], 3)
    with pytest.raises(KernelError, match="residual has shape"):
        move_tokens(hidden, hidden[:, :2], positions, positions, 3)
    with pytest.raises(KernelError, match="go together"):
        move_tokens(hidden, None, positions, positions, 3, older=hidden)
    with pytest.raises(KernelError, match=r"older must be torch.float32 of shape \(2, tokens, 3\)"):
        move_tokens(hidden, None, positions, positions, 3, older=hidden.double(), older_positions=positions)


@pytest.mark.skipif(interpreted(), reason="it looks at no kernel")
def test_passes_opcheck() -> None:
    inputs = move_inputs(torch.float32, 3, residual=True, others=True, older=2, device="cpu")
    leaves = [
        value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
    torch.library.opcheck(torch.ops.ssmprune.move_tokens, tuple(leaves))
    few: tuple[Any, ...] = (leaves[0], None, inputs.positions, inputs.order[:, :4].clone(), 4, None, None)
    torch.library.opcheck(torch.ops.ssmprune.move_tokens, few)
    score = torch.randn(2, 5)
    positions = torch.arange(5).repeat(2, 1)
    torch.library.opcheck(torch.ops.ssmprune.order_tokens, (score, positions, score > 0, [2], 3, True))
    torch.library.opcheck(torch.ops.ssmprune.order_tokens, (score, positions, None, [], 3, False))
    torch.library.opcheck(torch.ops.ssmprune.score_tokens, ([torch.randn(1, 2, 3)] * 2, "l2"))


@pytest.mark.slow
@pytest.mark.skipif(interpreted(), reason="it is this run")
def test_under_the_interpreter() -> None:
    """And the tests of the grid convolution, for which Triton is one more backend there."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    environment.pop("SSMPRUNE_BACKEND", None)
    files = [__file__, str(Path(__file__).with_name("test_grid_conv.py"))]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *files,
        "-k",
        "triton or pytorch or tile",
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
