"""Reductions and scores on plain tensors: order, protection, ties, and values worked by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssmprune_cli.errors import UsageError
from ssmprune_cli.interface import ScanStatistics
from ssmprune_cli.pruning import IMPORTANCES, REDUCTIONS, PruneSchedule, PruneSettings
from ssmprune_cli.tokens import TokenSequence

SCHEDULE = PruneSchedule((1,), (2,))


def sequence_of(length: int, protected: tuple[int, ...] = (), batch: int = 1) -> TokenSequence:
    hidden = torch.arange(batch * length, dtype=torch.float32).view(batch, length, 1).expand(-1, -1, 3).contiguous()
    sequence = TokenSequence.dense(hidden, protected)
    return TokenSequence(hidden, 10 * hidden, sequence.positions, length, protected)


def reduce(name: str, sequence: TokenSequence, score: Tensor, count: int) -> TokenSequence:
    return REDUCTIONS.get(name).apply(sequence, score, count)


def test_drop_keeps_the_best_in_ascending_position() -> None:
    score = torch.tensor([[0.1, 0.9, 0.0, 0.8, 0.5]])
    result = reduce("drop", sequence_of(5, protected=(2,)), score, 3)
    assert result.positions.tolist() == [[1, 2, 3]]
    assert result.hidden[0, :, 0].tolist() == [1, 2, 3]
    assert result.residual is not None and result.residual[0, :, 0].tolist() == [10, 20, 30]


def test_drop_unsorted_leaves_patches_in_score_order_and_the_class_token_at_its_rank() -> None:
    score = torch.tensor([[0.1, 0.9, 0.0, 0.8, 0.5]])
    # Kept: 1, 2 (protected), 3, 4. Ascending ranks put position 2 second; patches follow by falling score 1, 3, 4.
    assert reduce("drop-unsorted", sequence_of(5, (2,)), score, 4).positions.tolist() == [[1, 2, 3, 4]]
    score = torch.tensor([[0.1, 0.5, 0.0, 0.8, 0.9]])
    assert reduce("drop-unsorted", sequence_of(5, (2,)), score, 4).positions.tolist() == [[4, 2, 3, 1]]


def test_mask_zeroes_hidden_and_residual_and_keeps_the_length() -> None:
    score = torch.tensor([[0.1, 0.9, 0.0, 0.8, 0.5]])
    result = reduce("mask", sequence_of(5, (2,)), score, 3)
    assert result.hidden[0, :, 0].tolist() == [0, 1, 2, 3, 0]
    assert result.residual is not None and result.residual[0, :, 0].tolist() == [0, 10, 20, 30, 0]
    assert result.live is not None and result.live.tolist() == [[False, True, True, True, False]]
    # A second point cannot revive a token: 4 has the best score, but it is dead.
    again = reduce("mask", result, torch.tensor([[0.0, 0.1, 0.0, 0.2, 9.0]]), 2)
    assert again.live is not None and again.live.tolist() == [[False, False, True, True, False]]


@pytest.mark.parametrize("value", [0.0, -5.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("reduction", ["drop", "drop-unsorted", "mask"])
def test_equal_and_hostile_scores_keep_every_class_token(reduction: str, value: float) -> None:
    score = torch.full((3, 7), value)
    result = reduce(reduction, sequence_of(7, (6,), batch=3), score, 3)
    live = result.positions if result.live is None else result.positions.masked_fill(~result.live, -1)
    assert (live == 6).sum(dim=1).tolist() == [1, 1, 1]
    assert sorted(set(live[0].tolist()) - {-1}) == [0, 1, 6]  # ties go to the lower position


def test_one_nan_among_good_scores_is_the_first_to_go() -> None:
    score = torch.tensor([[0.1, float("nan"), 0.2]])
    assert reduce("drop", sequence_of(3), score, 2).positions.tolist() == [[0, 2]]


@given(st.data())
def test_drop_invariants(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 30))
    protected = tuple(sorted(data.draw(st.sets(st.integers(0, length - 1), max_size=3))))
    count = data.draw(st.integers(max(1, len(protected)), length))
    scores = data.draw(st.lists(st.floats(width=32), min_size=2 * length, max_size=2 * length))
    sequence, score = sequence_of(length, protected, batch=2), torch.tensor(scores).view(2, length)
    result = reduce("drop", sequence, score, count)
    assert result.positions.shape == (2, count)
    assert (result.positions.diff(dim=1) > 0).all()
    assert torch.equal(result.hidden[..., 0], sequence.hidden[..., 0].gather(1, result.positions))
    for row in range(2):
        kept = set(result.positions[row].tolist())
        assert kept >= set(protected)
        single = reduce(
            "drop", TokenSequence.dense(sequence.hidden[row : row + 1], protected), score[row : row + 1], count
        )
        assert single.positions.tolist()[0] == sorted(kept)  # independent of the batch


def test_gaps_count_dropped_tokens_in_scan_direction() -> None:
    sequence = sequence_of(8).keep(torch.tensor([[1, 2, 5, 7]]))
    assert sequence.gaps(reverse=False).tolist() == [[0, 0, 2, 1]]
    assert sequence.gaps(reverse=True).tolist() == [[0, 2, 1, 0]]
    assert sequence_of(3).keep(torch.tensor([[2]])).gaps(reverse=True).tolist() == [[0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip", [4 / 3, 0.0]),
        ("mean", [1.0, -2.0]),
        ("l1", [5 / 3, 2.0]),
        ("l2", [(17 / 3) ** 0.5, (14 / 3) ** 0.5]),
    ],
)
def test_scores_by_hand(name: str, expected: list[float]) -> None:
    # Two directions add up to [4, -1, 0] for the first token and [-1, -2, -3] for the second.
    forward, backward = torch.tensor([[[3.0, -2, 0], [0, 0, 0]]]), torch.tensor([[[1.0, 1, 0], [-1, -2, -3]]])
    score = IMPORTANCES.get(name).score(sequence_of(2), ScanStatistics((forward, backward)), 0, 0)
    torch.testing.assert_close(score, torch.tensor([expected]), rtol=1e-6, atol=0)


def test_random_score_depends_on_position_block_and_seed_only() -> None:
    random, statistics = IMPORTANCES.get("random").score, ScanStatistics((torch.randn(2, 500, 4),))
    sequence = sequence_of(500, batch=2)
    score = random(sequence, statistics, 3, 0)
    assert torch.equal(score[0], score[1])
    assert score[0].unique().numel() > 490  # 24 bits: about 0.007 collisions expected among 500
    kept = sequence.keep(torch.arange(250, 500).expand(2, -1))
    assert torch.equal(random(kept, statistics, 3, 0), score[:, 250:])
    for other in (random(sequence, statistics, 4, 0), random(sequence, statistics, 3, 1)):
        correlation = torch.corrcoef(torch.stack((score[0], other[0])))[0, 1]
        assert abs(correlation) < 0.2  # standard deviation 0.045 when independent
    assert abs(torch.corrcoef(torch.stack((score[0, :-1], score[0, 1:])))[0, 1]) < 0.2


def test_comparison_reductions_refuse_alignment() -> None:
    for name in ("mask", "drop-unsorted"):
        with pytest.raises(UsageError, match="nothing to align"):
            PruneSettings(SCHEDULE, reduction=name, alignment="null")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Did you mean 'clip'") as caught:
        PruneSettings(SCHEDULE, importance="clipp")
    assert "l1" in str(caught.value)
