"""Reductions that merge tokens, and what all reductions have in common."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.pruning import IMPORTANCES, REDUCTIONS
from ssmprune_cli.tokens import TokenSequence

# All that keep positions: a smaller whole grid has new ones, see test_grid_merge.
ORDERED = [name for name in REDUCTIONS.names() if REDUCTIONS.get(name).aligned and not REDUCTIONS.get(name).rectangular]
# All that merge every token that goes: frozen-pairs and pool leave some beside, hybrid drops a part for good.
MERGING = [
    name for name in REDUCTIONS.names() if REDUCTIONS.get(name).sized and name not in ("frozen-pairs", "hybrid", "pool")
]


def sequence_of(stream: Tensor, protected: tuple[int, ...] = ()) -> TokenSequence:
    """A sequence with `stream` (B, L, d), a part of it in the residual."""
    dense = TokenSequence.dense(0.75 * stream, protected)
    return TokenSequence(dense.hidden, 0.25 * stream, dense.positions, dense.length, protected)


def reduce(name: str, sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return REDUCTIONS.get(name).apply(sequence, score, count)


@st.composite
def problems(draw: st.DrawFn) -> tuple[TokenSequence, Tensor, int]:
    length = draw(st.integers(2, 24))
    protected = tuple(sorted(draw(st.sets(st.integers(0, length - 1), max_size=min(3, length - 1)))))
    count = draw(st.integers(len(protected) + 1, length))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    stream = torch.randn(3, length, 4, generator=generator)
    score = torch.randn(3, length, generator=generator)
    if draw(st.booleans()):
        score = torch.zeros_like(score)  # nothing but ties
    return sequence_of(stream, protected), score, count


@pytest.mark.parametrize("name", ORDERED)
@given(problem=problems())
def test_shape_order_protection_and_independence(name: str, problem: tuple[TokenSequence, Tensor, int]) -> None:
    sequence, score, count = problem
    result = reduce(name, sequence, score, count)
    assert result.positions.shape == (3, count)
    assert result.hidden.shape == (3, count, 4) and result.residual is not None
    assert (result.positions.diff(dim=1) > 0).all()
    for position in sequence.protected:
        assert (result.positions == position).sum(dim=1).tolist() == [1, 1, 1]
    if sequence.protected:
        assert torch.equal(result.protected_stream(), sequence.stream[:, sequence.protected])
    for sample in range(3):  # a sample alone gives the same
        own = slice(sample, sample + 1)
        alone = reduce(name, sequence_of(sequence.stream[own], sequence.protected), score[own], count)
        assert torch.equal(alone.positions, result.positions[own])
        assert torch.allclose(alone.stream, result.stream[own], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MERGING)
@given(problem=problems())
def test_sizes_add_up_to_the_dense_count(name: str, problem: tuple[TokenSequence, Tensor, int]) -> None:
    sequence, score, count = problem
    result = reduce(name, sequence, score, count)
    assert (result.sizes().sum(dim=1) == sequence.length).all() and (result.sizes() >= 1).all()
    assert result.positions.shape[1] == sequence.length - int((result.sizes() - 1).sum(dim=1)[0])
    # What is lost at one point stays counted at the next.
    again = reduce(name, result, score.gather(1, result.positions), max(len(sequence.protected) + 1, count - 2))
    assert (again.sizes().sum(dim=1) == sequence.length).all()


@pytest.mark.parametrize("name", ["merge", "keep-target-source", "local-merge"])
@given(problem=problems())
def test_merging_by_size_keeps_the_mean(name: str, problem: tuple[TokenSequence, Tensor, int]) -> None:
    sequence, score, count = problem
    result = reduce(name, sequence, score, count)
    # Float32 sums in another order: a few roundings of values around one.
    assert torch.allclose(result.mean(result.stream), sequence.mean(sequence.stream), rtol=0, atol=1e-5)


def test_merge_pairs_the_most_similar() -> None:
    # Positions 0, 1, 2, 4, 5 are patches, dealt in turn to {0, 2, 5} and {1, 4}; 3 is protected.
    stream = torch.tensor([[[1.0, 0], [2, 0.2], [0, 1], [9, 9], [0, -1], [1, 0.3]]])
    result = reduce("merge", sequence_of(stream, (3,)), torch.zeros(1, 6), 5)
    # 0 with 1: cosine 0.995. 5 with 1: 0.982. So 0 joins 1, at the place of 1.
    assert result.positions.tolist() == [[1, 2, 3, 4, 5]]
    assert torch.allclose(result.stream[0, 0], torch.tensor([1.5, 0.1]))
    assert result.size is not None and result.size.tolist() == [[2, 1, 1, 1, 1]]
    # Now 1 and 4 look for one of 2 and 5: the pair joins 5, and weighs twice as much.
    again = reduce("merge", result, torch.zeros(1, 5), 4)
    assert again.positions.tolist() == [[2, 3, 4, 5]] and again.sizes().tolist() == [[1, 1, 1, 3]]
    assert torch.allclose(again.stream[0, 3], torch.tensor([(2 * 1.5 + 1) / 3, (2 * 0.1 + 0.3) / 3]))


def test_the_gap_that_a_merged_token_leaves_is_counted() -> None:
    stream = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    result = reduce("merge", sequence_of(stream), torch.zeros(1, 4), 2)
    assert result.positions.tolist() == [[1, 3]] and result.sizes().tolist() == [[2, 2]]
    assert result.gaps(reverse=False).tolist() == [[0, 1]] and result.gaps(reverse=True).tolist() == [[1, 0]]


def test_more_than_half_can_go_at_once() -> None:
    result = reduce("merge", sequence_of(torch.randn(2, 11, 4), (5,)), torch.zeros(2, 11), 2)
    assert result.positions.shape == (2, 2) and (result.positions == 5).sum() == 2
    assert result.sizes().sort(dim=1).values.tolist() == [[1, 10], [1, 10]]


def test_hybrid_drops_half_and_merges_half() -> None:
    stream = torch.tensor([[[1.0, 0], [1, 0.1], [5, 5], [0, 1], [-3, 1], [7, -2]]])
    result = reduce("hybrid", sequence_of(stream), torch.tensor([[3.0, 4, 5, 6, 1, 2]]), 4)
    # One of two is dropped, the lowest score (4); of 0, 1, 2, 3, 5 the pair 0 and 1 is merged.
    assert result.positions.tolist() == [[1, 2, 3, 5]]
    assert result.sizes().tolist() == [[2, 1, 1, 1]]


def test_sources_join_the_most_similar_target() -> None:
    stream = torch.tensor([[[1.0, 0], [0, 1], [9, 1], [0, 2], [3, 0]]])
    # Scores: 2 is kept; 0 and 1 are targets (next lowest), 3 and 4 sources (lowest).
    result = reduce("keep-target-source", sequence_of(stream), torch.tensor([[3.0, 4, 9, 1, 2]]), 3)
    assert result.positions.tolist() == [[0, 1, 2]]
    assert torch.allclose(result.stream[0], torch.tensor([[2.0, 0], [0, 1.5], [9, 1]]))
    assert result.sizes().tolist() == [[2, 2, 1]]


def test_fuse_weighs_by_score_at_the_place_of_the_best() -> None:
    stream = torch.tensor([[[1.0], [10], [4], [100], [7]]])
    result = reduce("fuse", sequence_of(stream, (1,)), torch.tensor([[1.0, 0, 3, 9, 2]]), 3)
    # 1 is protected, 3 the best; 0, 2 and 4 are fused at 2 with weights of about 1, 3 and 2.
    assert result.positions.tolist() == [[1, 2, 3]]
    assert result.stream[0, 1, 0].item() == pytest.approx((1 + 3 * 4 + 2 * 7) / 6, rel=2e-3)
    assert result.sizes().tolist() == [[1, 3, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e5])
def test_fuse_leaves_the_others_alone_in_half_precision(dtype: torch.dtype, scale: float) -> None:
    torch.manual_seed(0)
    sequence = sequence_of(torch.randn(2, 9, 4).to(dtype), (4,))
    score = scale * torch.rand(2, 9)
    result = reduce("fuse", sequence, score, 5)
    assert result.hidden.isfinite().all()
    alone = result.sizes() == 1
    assert alone.sum() == 8
    assert torch.equal(result.hidden[alone], sequence.keep(result.positions).hidden[alone])


@pytest.mark.parametrize("name", MERGING)
def test_gradients_flow_through_merged_values(name: str) -> None:
    torch.manual_seed(0)
    stream = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    score = torch.rand(2, 9)
    assert torch.autograd.gradcheck(lambda x: reduce(name, sequence_of(x, (4,)), score, 4).stream, [stream])
    (gradient,) = torch.autograd.grad(reduce(name, sequence_of(stream, (4,)), score, 4).stream.sum(), stream)
    assert (gradient != 0).any(dim=2).all()  # nobody is left out


def score_of(name: str, sequence: TokenSequence, statistics: ScanStatistics) -> list[float]:
    found: list[float] = IMPORTANCES.get(name).score(sequence, statistics, 0, 0)[0].tolist()
    return found


def test_delta_hidden_norm_and_class_similarity_by_hand() -> None:
    y = torch.zeros(1, 3, 2)
    forward, backward = torch.tensor([[[1.0, 3], [0, 0], [2, 2]]]), torch.tensor([[[0.0, 0], [4, 0], [2, 2]]])
    stream = torch.tensor([[[3.0, 4], [0, 2], [-3, -4]]])
    sequence, statistics = sequence_of(stream, (1,)), ScanStatistics((y, y), (forward, backward))
    assert score_of("delta", sequence, statistics) == [1, 1, 2]
    assert IMPORTANCES.get("delta").needs == "delta" and IMPORTANCES.get("clip").needs == "y"
    assert score_of("hidden-norm", sequence, statistics) == pytest.approx([12.5**0.5, 2**0.5, 12.5**0.5])
    assert score_of("class-similarity", sequence, statistics) == pytest.approx([0.8, 1, -0.8])
    # Without a class token: cosine with the mean token, here (0, 2 / 3).
    assert score_of("class-similarity", sequence_of(stream), statistics) == pytest.approx([0.8, 1, -0.8])


@pytest.mark.parametrize("name", IMPORTANCES.names())
def test_equal_tokens_tie_and_protected_ones_survive(name: str) -> None:
    statistics = ScanStatistics((torch.ones(1, 6, 2),), (torch.ones(1, 6, 2),))
    sequence = sequence_of(torch.ones(1, 6, 2), (5,))
    score = IMPORTANCES.get(name).score(sequence, statistics, 0, 0)
    assert score.shape == (1, 6)
    kept = reduce("drop", sequence, score, 3).positions[0].tolist()
    assert kept[-1] == 5
    if name != "random":  # of equals, the first ones stay
        assert kept == [0, 1, 5]
