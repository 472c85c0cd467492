"""The convolution of kept tokens that still meets dropped ones: what the dense convolution gives at their places."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ssmprune_cli.errors import KernelError
from ssmprune_cli.kernels import backends_for, causal_conv1d, sparse_conv1d, use_backend
from ssmprune_cli.models.mamba.causal_sources import conv_sources
from ssmprune_cli.tokens import TokenSequence

AVAILABLE = backends_for(torch.zeros(1))


def split(dense: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, TokenSequence]:
    """Kept rows of `dense`, the others, and the sequence that has forgotten none of them."""
    sequence = TokenSequence.dense(dense).keep(kept, others="context")
    assert sequence.context is not None
    return sequence.hidden, sequence.context.stream.to(dense.dtype), sequence


@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_dense_convolution_and_its_gradients(backend: str, reverse: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense, weight, bias = torch.randn(2, 19, 37).to(dtype), torch.randn(37, 4), torch.randn(37)
    kept = torch.stack([torch.randperm(19)[:8].sort().values for _ in range(2)])
    index = kept[..., None].expand(-1, -1, 37)
    truth = [tensor.double().requires_grad_() for tensor in (dense, weight, bias)]
    expected = causal_conv1d(truth[0], truth[1], truth[2], reverse=reverse).gather(1, index)
    d_dense, *wanted = torch.autograd.grad(expected.sin().sum(), truth)
    use_backend(backend)
    x, context, sequence = split(dense, kept)
    assert sequence.context is not None
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, context, weight, bias)]
    found = sparse_conv1d(leaves[0], leaves[1], conv_sources(sequence, 4)[int(reverse)], leaves[2], leaves[3])
    d_x, d_context, *others = torch.autograd.grad(found.float().sin().sum(), leaves)
    gone = sequence.context.positions[..., None].expand(-1, -1, 37)
    pairs = [(found, expected), (d_x, d_dense.gather(1, index)), (d_context, d_dense.gather(1, gone))]
    tolerance = 5e-6 if dtype == torch.float32 else 0.02  # a rounded output moves its sine, too
    for a, b in (*pairs, *zip(others, wanted, strict=True)):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max()


def test_a_second_drop_remembers_the_first() -> None:
    dense = torch.arange(12.0).view(1, 12, 1)
    first = TokenSequence.dense(dense).keep(torch.tensor([[0, 2, 3, 7, 8, 9]]), others="context")
    second = first.keep(torch.tensor([[1, 2, 5]]), others="context")  # positions 2, 3 and 9
    x, context = second.hidden, second.context
    assert context is not None and second.positions.tolist() == [[2, 3, 9]]
    assert sorted(context.positions[0].tolist()) == [0, 1, 4, 5, 6, 7, 8, 10, 11]
    rows = torch.cat((x, context.stream), dim=1)[0, :, 0]
    forward, backward = conv_sources(second, 3)[:, 0]
    assert rows[forward].tolist() == [[0, 1, 2], [1, 2, 3], [7, 8, 9]]
    assert rows[backward].tolist() == [[4, 3, 2], [5, 4, 3], [11, 10, 9]]
    edge = TokenSequence.dense(dense).keep(torch.tensor([[0, 11]]), others="context")
    assert conv_sources(edge, 3)[0, 0, 0, :2].tolist() == [-1, -1]
    assert conv_sources(edge, 3)[1, 0, 1, :2].tolist() == [-1, -1]


def test_tokens_that_are_gone_are_not_met() -> None:
    dense = torch.arange(12.0).view(1, 12, 1)
    left = (
        TokenSequence.dense(dense).keep(torch.tensor([[1, 4, 5, 9, 11]])).keep(torch.tensor([[1, 3]]), others="context")
    )
    assert left.context is not None and left.positions.tolist() == [[4, 9]]
    rows = torch.cat((left.hidden, left.context.stream), dim=1)[0, :, 0]
    forward, backward = conv_sources(left, 2)[:, 0]
    assert rows[forward].tolist() == [[1, 4], [5, 9]]
    assert rows[backward].tolist() == [[5, 4], [11, 9]]


def test_what_does_not_fit_is_named() -> None:
    x, weight, bias = torch.zeros(1, 2, 3), torch.zeros(3, 4), torch.zeros(3)
    with pytest.raises(KernelError, match=r"sources must be int64 of shape \(1, 2, 4\)"):
        sparse_conv1d(x, x, torch.zeros(1, 2, 3, dtype=torch.int64), weight, bias)
    if "cpu" in AVAILABLE:
        use_backend("cpu")
        for outside in (-2, 4):
            with pytest.raises(KernelError, match="outside the tokens"):
                sparse_conv1d(x, x, torch.full((1, 2, 4), outside), weight, bias)


def test_passes_opcheck() -> None:
    leaves = [torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((1, 2, 3), (1, 3, 3))]
    weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((3, 2), (3,)))
    sources = torch.tensor([[[-1, 0], [4, 1]]])
    torch.library.opcheck(torch.ops.ssmprune.sparse_conv1d, (*leaves, sources, weight, bias))
